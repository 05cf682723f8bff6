"""What an analysis found, in plain sentences: the same ones on the console and at the head of the report.

Every sentence is computed from the stored numbers by a pure function, and says when a number is missing or
is too uncertain to carry a statement. Whether predicted and measured changes agree is decided by
entropy_experiments.statistics.agreement, from the error of their difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from entropy_experiments.records.history import holds_means, trusted_changes
from entropy_experiments.statistics.agreement import agreement_in_words, stored_agreement, told_from_zero
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.text.display import prompt_frame, quoted
from entropy_experiments.text.numbers import (
    as_number,
    counted,
    lookup,
    plain,
    plus_minus,
    series,
    signed,
    value_and_error,
)

Tone = Literal["plain", "good", "warning", "bad"]
# All three estimate the same gradient ∇h; the fixed-prefix estimator has another estimand and is never
# taken for it.
ESTIMATORS_OF_DELTA_H = ("rao_blackwell", "split", "score_function")
PARTS = {
    "batch": "this step's batch",
    "momentum": "momentum (earlier batches)",
    "weight_decay": "weight decay",
}
_UNIT = "nats per token"
# A gap beyond its error is a departure worth a look; beyond this part of the measured change the prediction has failed.
_LARGE_GAP = 0.25


@dataclass(frozen=True)
class Sentence:
    """One statement and how it is to be taken. The text is free of control characters, but is not escaped
    for markup.
    """

    text: str
    tone: Tone = "plain"

    def __str__(self) -> str:
        return self.text


def primary_estimator(summary: Mapping[str, Any]) -> str | None:
    """The first estimator of Δh for which the summary has a total."""
    for name in ESTIMATORS_OF_DELTA_H:
        if value_and_error(lookup(summary, "predicted", name, "total"))[0] is not None:
            return name
    return None


def training_sentence(history: Sequence[Mapping[str, Any]]) -> Sentence:
    """What entropy and reward did over the recorded training steps."""
    rows = sorted((row for row in history if as_number(row.get("step")) is not None), key=lambda row: row["step"])
    steps, entropy, reward = series(rows, "step"), series(rows, "entropy"), series(rows, "reward")
    known = np.flatnonzero(np.isfinite(entropy))
    if not len(known):
        return Sentence("What entropy did in training is not known: the folder holds no training history.", "warning")
    first, last = known[0], known[-1]
    if first == last:
        return Sentence(
            f"Entropy was {plain(entropy[first])} {_UNIT} at training step {steps[first]:g}, the only one recorded."
        )
    start, end = float(entropy[first]), float(entropy[last])
    change = (end - start) / start if start > 0 else 0.0
    movement = (
        "hardly changed, from"
        if abs(change) < 0.05
        else f"{'fell' if change < 0 else 'rose'} by {abs(change):.0%}, from"
    )
    span = f"steps {steps[first]:g} to {steps[last]:g}"
    text = f"In training ({span}) entropy {movement} {plain(start)} to {plain(end)} {_UNIT}"
    rewards = reward[np.isfinite(reward)]
    if len(rewards) > 1:
        text += f", while mean reward went from {plain(rewards[0])} to {plain(rewards[-1])}"
    return Sentence(text + ".")


def probe_sentence(history: Sequence[Mapping[str, Any]]) -> Sentence | None:
    """How well the probe's predictions held while training, over the steps that have both; None with fewer
    than two.
    """
    if holds_means(history):
        return Sentence(
            "What the probe predicted and measured was logged as means over several steps (logging_steps), so that their sums "
            "are not known.",
            "warning",
        )
    predicted, measured, left_out = trusted_changes(history)
    if len(predicted) < 2:
        return None
    text = (
        f"While training, the probe predicted {counted(len(predicted), 'step')}: the predicted changes "
        f"sum to "
        f"{signed(predicted.sum())}, the measured ones to {signed(measured.sum())} {_UNIT}"
    )
    found = correlation(predicted, measured)
    if found is not None:
        text += f" (correlation {found})"
    if left_out:
        text += f"; {counted(left_out, 'further step')} measured on too small an effective sample left out"
    return Sentence(text + ".")


def prediction_sentences(summary: Mapping[str, Any]) -> list[Sentence]:
    """How well the analysed step's change was predicted, and what weakens the comparison."""
    estimator = primary_estimator(summary)
    measured = lookup(summary, "actual", "snis")
    found: list[Sentence] = []
    if lookup(summary, "rows_drawn") is False:
        estimator, measured = "fixed_prefix", lookup(summary, "actual", "fixed_prefix")
        found.append(
            Sentence(
                "The evaluation sequences are given texts, not drawn from the policy: changes are of the entropy on "
                "their tokens, not of the policy's.",
                "warning",
            )
        )
    if lookup(summary, "step_analysed") is False:
        text = (
            "The training sequences have neither weights nor rewards, so there is no step: the kernel is all there is."
        )
        return [*found, Sentence(text)]
    actual, actual_error = actual_numbers = value_and_error(measured)
    step = as_number(lookup(summary, "checkpoint", "step"))
    where = (
        "The analysed step" if step is None else f"The next step from checkpoint {step:g}, on a fresh training buffer,"
    )
    total = lookup(summary, "predicted", estimator, "total") if estimator else None
    value, error = numbers = value_and_error(total)
    if value is None:
        return [*found, Sentence(f"{where} has no predicted change of entropy in this folder.", "bad")]
    if value == 0.0:
        return [*found, Sentence(f"{where} changes nothing to first order: was its learning rate 0?", "warning")]
    text = f"{where} was predicted to change entropy by {plus_minus(*numbers)} {_UNIT}"
    if actual is None:
        return [*found, Sentence(f"{text}; what it did change was not measured.", "warning")]
    text += f"; measured was {plus_minus(*actual_numbers)}."
    compared = stored_agreement(summary, estimator)
    if compared is None:
        why = (
            "Without standard errors of both"
            if error is None or actual_error is None
            else ("Without the error of their difference, which these results do not hold")
        )
        found.append(Sentence(f"{text} {why}, whether they agree cannot be said.", "warning"))
    else:
        far = abs(compared.difference) > _LARGE_GAP * abs(actual)
        tone: Tone = "good" if compared.agrees else "bad" if far else "warning"
        found.append(Sentence(f"{text} {agreement_in_words(compared, actual)}", tone))
    freedom = math.inf if compared is None else compared.degrees_of_freedom
    if told_from_zero(value, error, freedom) is False:
        found.append(
            Sentence(
                "The prediction itself is not told from zero (its 95% interval holds it), so agreement says little: analyse "
                "with more evaluation prompts.",
                "warning",
            )
        )
    effective, n = as_number(lookup(measured, "effective_sample_size")), as_number(lookup(measured, "n"))
    if effective is not None and n and effective < 0.5 * n:
        found.append(
            Sentence(
                f"The measured change is not to be trusted: reweighting left an effective sample of "
                f"{plain(effective)} "
                f"of {n:g} sequences, less than half.",
                "warning",
            )
        )
    return found


def part_sentence(summary: Mapping[str, Any]) -> Sentence | None:
    """Which of batch, momentum and weight decay moved entropy; None where the split is not known."""
    estimator = "fixed_prefix" if lookup(summary, "rows_drawn") is False else primary_estimator(summary)
    if estimator is None:
        return None
    numbers = {part: value_and_error(lookup(summary, "predicted", estimator, part)) for part in PARTS}
    values = {part: value for part, (value, _) in numbers.items() if value is not None}
    if not values or not any(values.values()):
        return None
    largest = max(values, key=lambda part: abs(values[part]))
    others = [f"{PARTS[part]} {plus_minus(*numbers[part])}" for part in values if part != largest]
    size = f"{plus_minus(*numbers[largest])} {_UNIT}"
    text = f"The largest part of the predicted change came from {PARTS[largest]}: {size}"
    if others:
        text += f" (beside it {' and '.join(others)})"
    against = [PARTS[part] for part, value in values.items() if value * values[largest] < 0]
    if against:
        text += f"; {' and '.join(against)} worked against it"
    return Sentence(text + ".")


def cost_sentences(training: Sequence[Mapping[str, Any]], all_prompts: Sequence[str] = ()) -> list[Sentence]:
    """Which training sequence and which prompt cost most entropy in this step.

    ``training``: rows with "row", "prompt_index", "prompt", "completion", "reward", "delta_h".
    ``all_prompts`` (default: those of ``training``) serves to leave out what all prompts have in common.
    """
    rows = [row for row in training if as_number(row.get("delta_h")) is not None]
    if not rows:
        return [Sentence("What single sequences cost is not known: no shares of the change were stored.", "warning")]
    frame = prompt_frame(list(all_prompts) or [row["prompt"] for row in rows])
    lowering = sum(row["delta_h"] < 0 for row in rows)
    raising = sum(row["delta_h"] > 0 for row in rows)
    sequences = counted(len(rows), "training sequence")
    text = f"Of {sequences}, {lowering} lowered entropy in this step and {raising} raised it"
    if not lowering:
        return [Sentence(f"{text}; none cost entropy.")]
    worst = min(rows, key=lambda row: row["delta_h"])
    found = [
        Sentence(
            f"{text}; the one that cost most is sequence {worst['row']} of prompt {worst['prompt_index']} "
            f"(reward {plain(worst.get('reward'))}): {signed(worst['delta_h'] * 1e3)} ×10⁻³ {_UNIT}, "
            f"{quoted(frame.own_part(worst['prompt']), keep='end')} answered by "
            f"{quoted(worst['completion'])}."
        )
    ]
    sums: dict[int, float] = {}
    for row in rows:
        sums[row["prompt_index"]] = sums.get(row["prompt_index"], 0.0) + row["delta_h"]
    if len(sums) > 1 and min(sums.values()) < 0:
        prompt = min(sums, key=lambda index: sums[index])
        example = next(row for row in rows if row["prompt_index"] == prompt)
        found.append(
            Sentence(
                f"Of {len(sums)} prompts, prompt {prompt} cost most, with all its sequences "
                f"{signed(sums[prompt] * 1e3)} ×10⁻³ {_UNIT}: "
                f"{quoted(frame.own_part(example['prompt']), keep='end')}."
            )
        )
    return found


def check_value(check: Mapping[str, Any]) -> str:
    """The number a self-check found; a check that ended in NaN or infinity says so."""
    value = check.get("value")
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    return plain(value)


def check_sentence(self_checks: Sequence[Mapping[str, Any]]) -> Sentence:
    """Whether the analysis's checks of itself passed; the failed ones by name and number."""
    if not self_checks:
        return Sentence("No self-checks were recorded: nothing vouches for these numbers.", "warning")
    failed = [check for check in self_checks if check.get("passed") is not True]
    if not failed:
        names = ", ".join(_name(check) for check in self_checks)
        return Sentence(f"All {counted(len(self_checks), 'self-check')} passed: {names}.", "good")
    described = [
        f"{_name(check)} ({check_value(check)}, tolerance {plain(check.get('tolerance'))})" for check in failed
    ]
    return Sentence(
        f"{len(failed)} of {counted(len(self_checks), 'self-check')} FAILED: {', '.join(described)}. "
        "Do not rely on the numbers below until this is explained.",
        "bad",
    )


def analysis_errors(summary: Mapping[str, Any]) -> dict[str, str]:
    """Name of each analysis that failed -> what went wrong, as the summary says."""
    analyses = lookup(summary, "analyses")
    return {
        str(name): str(lookup(result, "error"))
        for name, result in (analyses.items() if isinstance(analyses, Mapping) else ())
        if lookup(result, "error") is not None
    }


def failure_sentence(summary: Mapping[str, Any]) -> Sentence | None:
    """Which analyses failed, by name and with what; None where none did."""
    failed = [
        f"{name.replace('_', ' ')} ({quoted(error, 200)[1:-1]})" for name, error in analysis_errors(summary).items()
    ]
    if not failed:
        return None
    number = "1 analysis" if len(failed) == 1 else f"{len(failed)} analyses"
    return Sentence(
        f"{number} FAILED and {'is' if len(failed) == 1 else 'are'} missing below: {'; '.join(failed)}.", "bad"
    )


def _name(check: Mapping[str, Any]) -> str:
    return quoted(str(check.get("name", "unnamed")))[1:-1]


def write_verdict(
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    self_checks: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]] = (),
    all_prompts: Sequence[str] = (),
) -> list[Sentence]:
    """The verdict on an analysis, most important first; what failed comes before everything else.

    Parameters are the content of summary.json and training_history.json, run.json's "self_checks", and the
    training rows of sequences.parquet (see ``cost_sentences``).
    """
    checks = check_sentence(self_checks)
    found = [training_sentence(history), *prediction_sentences(summary), part_sentence(summary)]
    if lookup(summary, "step_analysed") is not False:
        found += cost_sentences(training, all_prompts)
    found.append(probe_sentence(history))
    sentences = [sentence for sentence in found if sentence is not None]
    failure = failure_sentence(summary)
    first = [] if failure is None else [failure]
    return [checks, *first, *sentences] if checks.tone == "bad" else [*first, *sentences, checks]
