"""What a sweep found, in plain sentences: the same ones on the console and at the head of its report.

Computed from the stored numbers alone (sweep.json, evolution.json); says when a number is missing or too uncertain to carry a
statement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.report.verdict import parts_sentence
from entropy_experiments.statistics.confidence import (
    AGREE,
    ALIKE,
    BRACKETS,
    CLOSE,
    DISAGREE,
    NOT_FROM_ZERO,
    UNTOLD,
    Sentence,
    change_word,
    correlation_words,
    known,
    shown,
)
from entropy_experiments.statistics.correlation import Correlation
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import counted, plain, signed
from rl_training.run.sums import check_sums

_UNIT = "nats per token"


def read_sweep_verdict(folder: Path) -> list[Sentence]:
    """The verdict on the sweep in `folder`, which must be put together."""
    check_sums(folder, "run the sweep again with --resume")
    sweep, evolutions = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("sweep.json", "evolution.json")
    )
    return write_sweep_verdict(sweep, evolutions)


def write_sweep_verdict(sweep: Mapping[str, Any], evolutions: Mapping[str, Mapping[str, Any]]) -> list[Sentence]:
    """Most important first: what is missing, then run by run; with several runs each sentence says whose it is."""
    found = _missing(sweep)
    for run, evolution in evolutions.items():
        lead = f"{run}: " if len(evolutions) > 1 else ""
        found += [Sentence(lead + sentence.text, sentence.tone) for sentence in run_sentences(evolution)]
    return found


def run_sentences(evolution: Mapping[str, Any]) -> list[Sentence]:
    """What entropy did, how well it was predicted, what caused it, what it bought, the law, the kernel, the checks."""
    found = [
        *_entropy(evolution),
        *_predicted(evolution),
        _caused(evolution),
        _sequences(evolution),
        _price(evolution),
        Sentence(evolution["law"]["training"]["sentence"]),
        _kernel(evolution),
        _checks(evolution),
    ]
    *sentences, checks = [sentence for sentence in found if sentence is not None]
    return [checks, *sentences] if checks.tone == "bad" else [*sentences, checks]


def _missing(sweep: Mapping[str, Any]) -> list[Sentence]:
    broken = [entry for entry in sweep["checkpoints"] if entry["status"] != "done"]
    if not broken:
        return []
    first = broken[0]
    why = first["error"] or "it was not analysed yet"
    more = "" if len(broken) == 1 else f"; and {len(broken) - 1} more"
    text = f"{len(broken)} of {counted(len(sweep['checkpoints']), 'checkpoint')} MISSING below: {first['name']} ({why}){more}."
    return [Sentence(quoted(text, 600)[1:-1], "bad")]


def _entropy(evolution: Mapping[str, Any]) -> list[Sentence]:
    rows = evolution["checkpoints"]
    first, last = rows[0], rows[-1]
    ends = [known(row["entropy"]) for row in (first, last)]
    if len(rows) == 1 or None in ends:
        text = f"Entropy at step {last['step']} was {shown(last['entropy'], plus=False)} {_UNIT}"
        return [Sentence(f"{text}; how it moved needs two checkpoints.", "warning")]
    prompts = counted(evolution["comparable"]["prompts"], "evaluation prompt")
    observed = known(evolution["whole"]["observed"])
    word = UNTOLD if observed is None else change_word(observed)
    went = f"{shown(first['entropy'], plus=False)} to {shown(last['entropy'], plus=False)} {_UNIT}"
    text = f"Between steps {first['step']} and {last['step']} entropy {word}: {went}, a change of "
    found = [Sentence(f"{text}{shown(evolution['whole']['observed'])} on the same {prompts} ({BRACKETS}).")]
    price = evolution["whole"]["price"]
    reward = None if price is None else known(price["reward_change"])
    if reward is not None:
        ends_of_reward = " to ".join(shown(row["reward"], plus=False) for row in (first, last))
        text = f"Their mean reward {change_word(reward)}: {ends_of_reward}, a change of {reward.text()}"
        found.append(Sentence(f"{text} ({BRACKETS})."))
    return found


def _predicted(evolution: Mapping[str, Any]) -> list[Sentence]:
    prediction, whole = evolution["whole"]["prediction"], evolution["whole"]
    found = []
    if prediction["compared"]:
        alike, count = prediction["agreeing"], prediction["compared"]
        text = (
            f"The next step from each checkpoint: predicted and measured {ALIKE} at {alike} of {count}, to the error of their "
            f"difference (sums: predicted {shown(prediction['predicted'])}, measured {shown(prediction['actual'])} {_UNIT}"
        )
        pairs = prediction["steps"]
        correlation = None
        if prediction["correlation"] is not None:
            correlation = Correlation(prediction["correlation"], *prediction["correlation_interval"], pairs)
        if pairs > 1:
            text += f"; {correlation_words(correlation, pairs)}"
        tone = "plain" if alike >= 0.8 * count else "bad" if alike < 0.5 * count else "warning"
        found.append(Sentence(f"{text}; {BRACKETS}).", tone))
    else:
        found.append(Sentence("No checkpoint has both a predicted and a measured change of entropy.", "warning"))
    doubtful = [row["step"] for row in evolution["checkpoints"] if row["trustworthy"] is False]
    if doubtful:
        text = (
            f"Measurements at {_steps(doubtful)} are not to be trusted, and are in no sum or correlation: reweighting left less "
            "than half of the sequences."
        )
        found.append(Sentence(text, "warning"))
    difference, observed = known(whole["difference"]), known(whole["observed"])
    if len(evolution["checkpoints"]) > 1 and known(whole["expected"]) and difference and observed:
        text = f"Added up over the run, the predicted steps make {shown(whole['expected'])}, "
        text += f"entropy did {observed.text()} {_UNIT}"
        if difference.low is not None and difference.high is not None:
            close = max(abs(difference.low), abs(difference.high)) <= CLOSE * abs(observed.value)
            word = DISAGREE if difference.holds_zero is False else AGREE if close else ALIKE
            text += (
                f": they {word}, differing by {difference.text()}, where predictions are of one fresh batch a checkpoint, first "
                "order, and the run took its own batches"
            )
        found.append(Sentence(f"{text} ({BRACKETS})."))
    return found


def _caused(evolution: Mapping[str, Any]) -> Sentence | None:
    parts = {name: known(value) for name, value in evolution["whole"]["parts"].items()}
    largest = evolution["whole"]["largest_part"]
    return parts_sentence(
        {name: value for name, value in parts.items() if value is not None},
        "change predicted over the run",
        None if largest is None else largest["certain"],
    )


def _sequences(evolution: Mapping[str, Any]) -> Sentence | None:
    shares = [row["by_advantage"] for row in evolution["checkpoints"] if row["by_advantage"]]
    if not shares:
        return None
    above, below = (sum(share[key] for share in shares) for key in ("above", "below"))
    text = (
        f"Within the batches, sequences rewarded above their prompt's mean moved entropy by {signed(above)}, those below it by "
        f"{signed(below)} {_UNIT} (accounting shares of the analysed steps, added up)"
    )
    costly = evolution["whole"]["costliest_prompts"]
    if costly:
        first, its_sum = costly[0]["prompt_index"], signed(costly[0]["share"])
        text += f"; by these sums prompt {first} comes first ({its_sum}), how surely is not known"
    return Sentence(text + ".")


def _price(evolution: Mapping[str, Any]) -> Sentence | None:
    price = evolution["whole"]["price"]
    if price is None:
        return None
    if price["price"]["value"] is None:
        return Sentence(f"Entropy has no price in reward over this run: {price['reason']}.")
    value = known(price["price"])
    if value is None or value.holds_zero is not False:
        text = f"The price of one unit of mean reward in entropy {NOT_FROM_ZERO}: {shown(price['price'], plus=False)}"
        return Sentence(f"{text} {_UNIT} ({BRACKETS}).")
    paid = "was paid in entropy" if value.value > 0 else "came with a gain of entropy,"
    return Sentence(f"Reward {paid} at {value.text(plus=False)} {_UNIT} for one unit of mean reward ({BRACKETS}).")


def _kernel(evolution: Mapping[str, Any]) -> Sentence | None:
    known = [change["alignment"] for change in evolution["changes"] if change["alignment"]["value"] is not None]
    if not known:
        return None
    values = [alignment["value"] for alignment in known]
    clear = sum(alignment["p_value"] <= 0.05 for alignment in known)
    text = (
        f"Successive kernels couple the evaluation prompts alike beyond chance at {clear} of {counted(len(known), 'pair')} "
        f"(p ≤ 0.05; debiased alignment {plain(min(values), 2)} to {plain(max(values), 2)})"
    )
    first, last = (evolution["checkpoints"][k]["effective_rank"] for k in (0, -1))
    if first and last and None not in (first["value"], last["value"]):
        text += f"; their effective rank went from {plain(first['value'], 2)} to {plain(last['value'], 2)}"
    return Sentence(text + ".")


def _checks(evolution: Mapping[str, Any]) -> Sentence:
    failed = [row for row in evolution["checkpoints"] if row["failed_checks"] or row["failed_analyses"]]
    count = len(evolution["checkpoints"])
    if not failed:
        return Sentence(
            f"All self-checks passed at {'the one checkpoint' if count == 1 else f'all {count} checkpoints'}.", "good"
        )
    names = sorted({name for row in failed for name in (*row["failed_checks"], *row["failed_analyses"])})
    return Sentence(
        f"At {_steps([row['step'] for row in failed])} self-checks or analyses FAILED: {', '.join(names)}. Do not rely on these "
        "checkpoints until this is explained.",
        "bad",
    )


def _steps(steps: list[int]) -> str:
    return f"step{'' if len(steps) == 1 else 's'} {', '.join(map(str, steps))}"
