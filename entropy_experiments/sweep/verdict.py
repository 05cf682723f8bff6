"""What a sweep found, in plain sentences: the same ones on the console and at the head of its report.

Computed from the stored numbers alone (sweep.json, evolution.json); says when a number is missing or too uncertain to carry a
statement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.report.verdict import PARTS
from entropy_experiments.statistics.agreement import told_from_zero
from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.statistics.correlation import Correlation
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import as_number, counted, lookup, plain, plus_minus, signed, value_and_error

_UNIT = "nats per token"


def read_sweep_verdict(folder: Path) -> list[Sentence]:
    """The verdict on the sweep in `folder`, which must be put together."""
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
        _entropy(evolution),
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


def _entropy(evolution: Mapping[str, Any]) -> Sentence:
    rows = evolution["checkpoints"]
    first, last = rows[0], rows[-1]
    values = [lookup(row["entropy"], "value") for row in (first, last)]
    if len(rows) == 1 or None in values:
        text = f"Entropy at step {last['step']} was {plus_minus(*value_and_error(last['entropy']), plus=False)} {_UNIT}"
        return Sentence(f"{text}; how it moved needs two checkpoints.", "warning")
    observed = evolution["whole"]["observed"]
    change, error = value_and_error(observed)
    known = told_from_zero(change, error, _freedom(evolution))
    word = "did not change beyond its error" if not known else ("fell" if (change or 0) < 0 else "rose")
    text = (
        f"Between steps {first['step']} and {last['step']} entropy {word}: {plain(values[0])} to {plain(values[1])} {_UNIT} "
        f"({plus_minus(change, error)}) on {counted(evolution['comparable']['prompts'], 'evaluation prompt')}"
    )
    rewards = [value_and_error(row["reward"]) for row in (first, last)]
    if rewards[0][0] is not None and rewards[1][0] is not None:
        went = " to ".join(plus_minus(*reward, plus=False) for reward in rewards)
        text += f", while their mean reward went from {went}"
    return Sentence(text + ".")


def _freedom(evolution: Mapping[str, Any]) -> int:
    """Of errors over the evaluation prompts that all checkpoints share."""
    return max(1, evolution["comparable"]["prompts"] - 1)


def _predicted(evolution: Mapping[str, Any]) -> list[Sentence]:
    prediction, whole = evolution["whole"]["prediction"], evolution["whole"]
    found = []
    if prediction["compared"]:
        agree, count = prediction["agreeing"], prediction["compared"]
        sums = (plus_minus(prediction[name], prediction[f"{name}_error"]) for name in ("predicted", "actual"))
        text = (
            f"The next step from each checkpoint agrees with its measurement, to the error of their difference, at {agree} of "
            f"{count} (sums: predicted {next(sums)}, measured {next(sums)} {_UNIT}"
        )
        if prediction["correlation"] is not None:
            low, high = prediction["correlation_interval"]
            text += f"; correlation {Correlation(prediction['correlation'], low, high, prediction['steps'])}"
        tone = "good" if agree >= 0.8 * count else "bad" if agree < 0.5 * count else "warning"
        found.append(Sentence(text + ").", tone))
    else:
        found.append(Sentence("No checkpoint has both a predicted and a measured change of entropy.", "warning"))
    doubtful = [row["step"] for row in evolution["checkpoints"] if row["trustworthy"] is False]
    if doubtful:
        text = (
            f"Measurements at {_steps(doubtful)} are not to be trusted, and are in no sum or correlation: reweighting left less "
            "than half of the sequences."
        )
        found.append(Sentence(text, "warning"))
    difference, error = value_and_error(whole["difference"])
    if len(evolution["checkpoints"]) > 1 and whole["expected"]["value"] is not None and difference is not None:
        text = (
            f"Added up over the run, the predicted steps make {plus_minus(*value_and_error(whole['expected']))}, entropy did "
            f"{plus_minus(*value_and_error(whole['observed']))} {_UNIT}"
        )
        if error:
            agree = not told_from_zero(difference, error, _freedom(evolution))
            text += f": {'they agree' if agree else 'they do NOT agree'} (difference {plus_minus(difference, error)})"
            text += (
                ", where predictions are of one fresh batch a checkpoint, first order, and the run took its own batches"
            )
        found.append(Sentence(text + "."))
    return found


def _caused(evolution: Mapping[str, Any]) -> Sentence | None:
    parts = {name: as_number(value) for name, value in evolution["whole"]["parts"].items()}
    known = {name: value for name, value in parts.items() if value}
    if not known:
        return None
    largest = max(known, key=lambda name: abs(known[name]))
    others = [
        f"{PARTS[name]} {signed(value)}" for name, value in parts.items() if name != largest and value is not None
    ]
    text = f"Of the predicted change most came from {PARTS[largest]}: {signed(known[largest])} {_UNIT}"
    return Sentence(f"{text} (beside it {' and '.join(others)})." if others else f"{text}.")


def _sequences(evolution: Mapping[str, Any]) -> Sentence | None:
    shares = [row["by_advantage"] for row in evolution["checkpoints"] if row["by_advantage"]]
    if not shares:
        return None
    above, below = (sum(share[key] for share in shares) for key in ("above", "below"))
    text = (
        f"Within the batches, sequences rewarded above their prompt's mean moved entropy by {signed(above)}, those below it by "
        f"{signed(below)} {_UNIT} (shares of the analysed steps, added up)"
    )
    costly = evolution["whole"]["costliest_prompts"]
    if costly:
        text += f"; the prompt that cost most is {costly[0]['prompt_index']} ({signed(costly[0]['share'])})"
    return Sentence(text + ".")


def _price(evolution: Mapping[str, Any]) -> Sentence | None:
    price = evolution["whole"]["price"]
    if price is None:
        return None
    if price["price"]["value"] is None:
        return Sentence(f"Entropy has no price in reward over this run: {price['reason']}.")
    value = plus_minus(*value_and_error(price["price"]), plus=False)
    return Sentence(f"Reward was paid in entropy at {value} {_UNIT} for one unit of mean reward.")


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
    ranks = [
        lookup(row["effective_rank"], "value") for row in (evolution["checkpoints"][0], evolution["checkpoints"][-1])
    ]
    if None not in ranks:
        text += f"; their effective rank went from {plain(ranks[0], 2)} to {plain(ranks[1], 2)}"
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
