"""What a sweep found, in plain sentences: the same ones on the console and at the head of its report.

Computed from the stored numbers alone (sweep.json, evolution.json); says when a number is missing or too uncertain to carry a
statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from entropy_experiments.analyses.who_was_first import BOOTSTRAPS
from entropy_experiments.records.evolution import Evolution, PromptSum
from entropy_experiments.records.files import read_record
from entropy_experiments.records.sweep_record import SWEEP_REMEDY, SweepRecord, read_sweep
from entropy_experiments.report.evolution_words import law_sentence
from entropy_experiments.report.verdict import PARTS, parts_sentence, with_source
from entropy_experiments.statistics.confidence import (
    ALIKE,
    BRACKETS,
    NOT_FROM_ZERO,
    UNTOLD,
    Known,
    Sentence,
    change_word,
    correlation_words,
    few_prompts_sentence,
    gap_word,
    shown,
)
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import counted, plain, signed

_UNIT = "nats per token"


def read_sweep_verdict(folder: Path) -> list[Sentence]:
    """The verdict on the sweep in `folder`, which must be put together.

    Raises:
        UserError: A file of the sweep cannot be read.
    """
    sweep = read_sweep(folder)
    return write_sweep_verdict(sweep, read_record(folder / "evolution.json", dict[str, Evolution], remedy=SWEEP_REMEDY))


def write_sweep_verdict(sweep: SweepRecord, evolutions: Mapping[str, Evolution]) -> list[Sentence]:
    """Most important first: what is missing, then run by run; with several runs each sentence says whose it is."""
    found = with_source("sweep.json: checkpoints", _missing(sweep))
    if len(evolutions) == 1:
        return found + [sentence for evolution in evolutions.values() for sentence in run_sentences(evolution)]
    for run, evolution in evolutions.items():
        for place, sentence in enumerate(run_sentences(evolution)):
            lead = sentence.lead and (place == 0 or sentence.tone == "bad")
            found.append(replace(sentence, text=f"{run}: {sentence.text}", lead=lead))
    return found


def run_sentences(evolution: Evolution) -> list[Sentence]:
    """What entropy did, how well it was predicted, what caused it, what it bought, the law, the kernel, the checks."""
    sources: list[tuple[str, list[Sentence | None], int]] = [
        ("whole.observed", [*_entropy(evolution)], 2),
        ("comparable.prompts; whole.observed, whole.expected: degrees_of_freedom", [_few_prompts(evolution)], 0),
        ("whole.prediction; checkpoints: predicted, actual", [*_predicted(evolution)], 1),
        ("whole.expected, whole.difference", [*_added_up(evolution)], 1),
        ("whole.parts", [_caused(evolution)], 1),
        ("checkpoints: by_advantage; whole.most_lowering_prompts", [_sequences(evolution)], 0),
        ("whole.price", [_price(evolution)], 0),
        ("law.training", [Sentence(law_sentence(evolution.law.training))], 0),
        ("changes: alignment; checkpoints: effective_rank", [_kernel(evolution)], 0),
    ]
    known = [one for field, said, lead in sources for one in with_source(f"evolution.json: {field}", said, lead)]
    checks = with_source("evolution.json: checkpoints, failed_checks", [_checks(evolution)])
    return [*checks, *known] if checks[0].tone == "bad" else [*known, *checks]


def _missing(sweep: SweepRecord) -> list[Sentence]:
    missing = [(entry.name, why) for entry in sweep.checkpoints if (why := entry.missing) is not None]
    if not missing:
        return []
    name, why = missing[0]
    more = "" if len(missing) == 1 else f"; and {len(missing) - 1} more"
    of = counted(len(sweep.checkpoints), "checkpoint")
    return [Sentence(quoted(f"{len(missing)} of {of} MISSING below: {name} ({why}){more}.", 600)[1:-1], "bad")]


def _entropy(evolution: Evolution) -> list[Sentence]:
    rows, whole = evolution.checkpoints, evolution.whole
    first, last = rows[0], rows[-1]
    if len(rows) == 1 or first.entropy.value is None or last.entropy.value is None:
        text = f"Entropy at step {last.step} was {last.entropy.shown(plus=False)} {_UNIT}"
        return [Sentence(f"{text}; how it moved needs two checkpoints.", "warning")]
    prompts = counted(evolution.comparable.prompts, "evaluation prompt")
    observed = whole.observed.known()
    word = UNTOLD if observed is None else change_word(observed)
    went = f"{first.entropy.shown(plus=False)} to {last.entropy.shown(plus=False)} {_UNIT}"
    text = f"Between steps {first.step} and {last.step} entropy {word}: {went}, a change of "
    found = [Sentence(f"{text}{shown(observed)} on the same {prompts} ({BRACKETS}).")]
    reward = None if whole.price is None else whole.price.reward_change.known()
    if reward is not None:
        ends = " to ".join("not known" if row.reward is None else row.reward.shown(plus=False) for row in (first, last))
        found.append(
            Sentence(f"Their mean reward {change_word(reward)}: {ends}, a change of {reward.text()} ({BRACKETS}).")
        )
    return found


def _few_prompts(evolution: Evolution) -> Sentence | None:
    """What the intervals are worth where few evaluation prompts are behind them."""
    whole = evolution.whole
    freedoms = {"observed": whole.observed.degrees_of_freedom, "predicted": whole.expected.degrees_of_freedom}
    several = len(evolution.checkpoints) > 1
    warning = few_prompts_sentence(evolution.comparable.prompts, freedoms if several else None)
    return None if warning is None else Sentence(warning, "warning")


def _predicted(evolution: Evolution) -> list[Sentence]:
    """The next step from each checkpoint, and measurements that are not to be trusted."""
    prediction = evolution.whole.prediction
    found = [Sentence("No checkpoint has both a predicted and a measured change of entropy.", "warning")]
    if prediction.compared:
        alike, count = prediction.agreeing, prediction.compared
        text = (
            f"The next step from each checkpoint: predicted and measured {ALIKE} at {alike} of {counted(count, 'checkpoint')} "
            f"by the error of their difference (sums: predicted {prediction.predicted.shown()}, measured "
            f"{prediction.actual.shown()} {_UNIT}"
        )
        if prediction.steps > 1:
            text += f"; {correlation_words(prediction.correlation_found, prediction.steps)}"
        tone = "plain" if alike >= 0.8 * count else "bad" if alike < 0.5 * count else "warning"
        found = [Sentence(f"{text}; {BRACKETS}).", tone)]
    doubtful = [row.step for row in evolution.checkpoints if row.trustworthy is False]
    if doubtful:
        text = (
            f"Measurements at {_steps(doubtful)} are not to be trusted, and are in no sum or correlation: reweighting left less "
            "than half of the sequences."
        )
        found.append(Sentence(text, "warning"))
    return found


def _added_up(evolution: Evolution) -> list[Sentence]:
    """The predicted steps added up over the run, beside what entropy did."""
    whole = evolution.whole
    difference, observed, expected = whole.difference.known(), whole.observed.known(), whole.expected.known()
    if len(evolution.checkpoints) < 2 or difference is None or observed is None or expected is None:
        return []
    text = f"Added up over the run, the predicted steps make {expected.text()}, entropy did {observed.text()} {_UNIT}"
    if difference.holds_zero is not None:
        text += (
            f": they {gap_word(difference, observed.value)}, differing by {difference.text()}; predictions are to first order "
            "and of one fresh batch a checkpoint, and the run took its own batches"
        )
    return [Sentence(f"{text} ({BRACKETS}).")]


def _caused(evolution: Evolution) -> Sentence | None:
    sums, largest = evolution.whole.parts, evolution.whole.largest_part
    parts = {part: number for part in PARTS if (number := getattr(sums, part).known()) is not None}
    return parts_sentence(parts, "change predicted over the run", None if largest is None else largest.certain)


def _sequences(evolution: Evolution) -> Sentence | None:
    shares = [row.by_advantage for row in evolution.checkpoints if row.by_advantage is not None]
    if not shares:
        return None
    above, below = sum(share.above for share in shares), sum(share.below for share in shares)
    text = (
        f"Within the batches, sequences rewarded above their prompt's mean moved entropy by {signed(above)}, those below it by "
        f"{signed(below)} {_UNIT} (accounting shares of the analysed steps, added up)"
    )
    if prompts := evolution.whole.most_lowering_prompts:
        text += f"; {_first_prompt(prompts[0])}"
    return Sentence(text + ".")


def _first_prompt(first: PromptSum) -> str:
    """Which training prompt comes first by its shares over the run, and how surely."""
    number = Known(first.share, first.low, first.high)
    own = signed(first.share) if first.low is None else f"{number.text()} {_UNIT}"
    if first.first_in is None:
        return f"by these sums prompt {first.prompt_index} comes first ({own}), how surely is not known"
    often = f"first in {first.first_in:.0%} of {BOOTSTRAPS} bootstraps over evaluation prompts"
    if first.first_in > 0.5:
        return f"by these sums prompt {first.prompt_index} comes first ({own}; {often})"
    return f"by these sums no single prompt comes first: prompt {first.prompt_index} has the lowest ({own}), but is {often}"


def _price(evolution: Evolution) -> Sentence | None:
    price = evolution.whole.price
    if price is None:
        return None
    value = price.price.known()
    if value is None:
        return Sentence(f"What reward cost in entropy over this run is not given: {price.reason}.")
    if value.holds_zero is not False:
        text = f"The price of one unit of mean reward in entropy {NOT_FROM_ZERO}: {value.text(plus=False)}"
        return Sentence(f"{text} {_UNIT} ({BRACKETS}).")
    paid = "was paid in entropy" if value.value > 0 else "came with a gain of entropy,"
    return Sentence(f"Reward {paid} at {value.text(plus=False)} {_UNIT} for one unit of mean reward ({BRACKETS}).")


def _kernel(evolution: Evolution) -> Sentence | None:
    aligned = [change.alignment for change in evolution.changes]
    values = [alignment.value for alignment in aligned if alignment.value is not None]
    if not values:
        return None
    clear = sum(alignment.p_value is not None and alignment.p_value <= 0.05 for alignment in aligned)
    text = (
        f"Successive kernels couple the evaluation prompts alike beyond chance at {clear} of {counted(len(values), 'pair')} "
        f"(p ≤ 0.05; debiased alignment {plain(min(values), 2)} to {plain(max(values), 2)})"
    )
    known = [rank and rank.known() for rank in (evolution.checkpoints[k].effective_rank for k in (0, -1))]
    if None not in known:
        first, last = (shown(rank, plus=False) for rank in known)
        text += f"; their effective rank is {first} at first and {last} at last ({BRACKETS})"
    return Sentence(text + ".")


def _checks(evolution: Evolution) -> Sentence:
    failed = [row for row in evolution.checkpoints if row.failed]
    count = len(evolution.checkpoints)
    if not failed:
        where = "the one checkpoint" if count == 1 else f"all {count} checkpoints"
        return Sentence(f"All self-checks passed at {where}.", "good")
    names = ", ".join(sorted({name for row in failed for name in row.failed}))
    return Sentence(
        f"At {_steps([row.step for row in failed])} self-checks or analyses FAILED: {names}. Do not rely on these checkpoints "
        "until this is explained.",
        "bad",
    )


def _steps(steps: list[int]) -> str:
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(map(str, steps))}"
