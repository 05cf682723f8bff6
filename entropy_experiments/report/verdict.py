"""What an analysis found, in plain sentences: the same ones on the console and at the head of the report.

Every sentence is computed from the stored numbers by a pure function, and says when a number is missing or is too uncertain to
carry a statement. Which words for which evidence is decided in entropy_experiments.statistics.confidence, whether predicted and
measured changes agree in entropy_experiments.statistics.agreement.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_experiments.report.check_words import check_sentences
from entropy_experiments.report.training_verdict import probe_sentence, training_sentences
from entropy_experiments.report.verdict_attribution import cost_sentences, training_noise_sentence
from entropy_experiments.statistics.agreement import stored_agreement
from entropy_experiments.statistics.confidence import (
    AGREE,
    BRACKETS,
    NOT_FROM_ZERO,
    UNTOLD,
    Known,
    Sentence,
    agreement_sentence,
    agreement_tone,
    few_prompts_sentence,
    freedom_of_analysis,
    known,
)
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import as_number, lookup, plain, value_and_error

# All three estimate the same gradient ∇h; the fixed-prefix estimator has another estimand and is never
# taken for it.
ESTIMATORS_OF_DELTA_H = ("rao_blackwell", "split", "score_function")
PARTS = {
    "batch": "this step's batch",
    "momentum": "momentum (earlier batches)",
    "weight_decay": "weight decay",
}
_UNIT = "nats per token"


def primary_estimator(summary: Mapping[str, Any]) -> str | None:
    """The first estimator of Δh for which the summary has a total."""
    for name in ESTIMATORS_OF_DELTA_H:
        if value_and_error(lookup(summary, "predicted", name, "total"))[0] is not None:
            return name
    return None


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
    freedom = freedom_of_analysis(summary)
    actual = known(measured, freedom)
    step = as_number(lookup(summary, "checkpoint", "step"))
    where = (
        "The analysed step" if step is None else f"The next step from checkpoint {step:g}, on a fresh training buffer,"
    )
    value = known(lookup(summary, "predicted", estimator, "total"), freedom) if estimator else None
    if value is None:
        return [*found, Sentence(f"{where} has no predicted change of entropy in this folder.", "bad")]
    if value.value == 0.0:
        return [*found, Sentence(f"{where} changes nothing to first order: was its learning rate 0?", "warning")]
    text = f"{where} was predicted to change entropy by {value.text()} {_UNIT}"
    if actual is None:
        return [*found, Sentence(f"{text}; what it did change was not measured.", "warning")]
    text += f"; measured was {actual.text()} ({BRACKETS})."
    compared = stored_agreement(summary, estimator)
    if compared is None:
        why = (
            "Without standard errors of both"
            if value.holds_zero is None or actual.holds_zero is None
            else ("Without the error of their difference, which these results do not hold")
        )
        found.append(Sentence(f"{text} {why}, whether they {AGREE} cannot be said.", "warning"))
    else:
        found.append(
            Sentence(f"{text} {agreement_sentence(compared, actual.value)}", agreement_tone(compared, actual.value))
        )
    if value.holds_zero:
        found.append(
            Sentence(
                f"The prediction itself {NOT_FROM_ZERO} (its 95% interval holds it), so that agreement says little: analyse "
                "with more evaluation prompts.",
                "warning",
            )
        )
    effective, n = as_number(lookup(measured, "effective_sample_size")), as_number(lookup(measured, "n"))
    if effective is not None and n and effective < 0.5 * n:
        found.append(
            Sentence(
                f"The measured change is not to be trusted: reweighting left an effective sample of {plain(effective)} "
                f"of {n:g} sequences, less than half.",
                "warning",
            )
        )
    shown_entries = {"predicted": lookup(summary, "predicted", estimator, "total"), "measured": measured}
    if warning := few_prompts_sentence(summary, shown_entries):
        found.append(Sentence(warning, "warning"))
    return found


def part_sentence(summary: Mapping[str, Any]) -> Sentence | None:
    """Which of batch, momentum and weight decay moved entropy; None where the split is not known."""
    estimator = "fixed_prefix" if lookup(summary, "rows_drawn") is False else primary_estimator(summary)
    if estimator is None:
        return None
    freedom = freedom_of_analysis(summary)
    found = {part: known(lookup(summary, "predicted", estimator, part), freedom) for part in PARTS}
    certain = lookup(summary, "largest_part", estimator, "certain")
    return parts_sentence(
        {part: number for part, number in found.items() if number is not None}, "predicted change", certain
    )


def parts_sentence(parts: Mapping[str, Known], what: str, certain: bool | None = None) -> Sentence | None:
    """Which part was largest; None where no part is known or moves.

    certain: whether it is larger than every other by the paired difference (statistics.largest_part); where that is not known it
    is said where its interval lies beyond those of all others.
    """
    if not any(number.value for number in parts.values()):
        return None
    largest = max(parts, key=lambda part: abs(parts[part].value))
    others = [part for part in parts if part != largest]
    listed = [f"{PARTS[part]} {parts[part].text()}" for part in others]
    if certain is None:
        certain = parts[largest].smallest > max((parts[part].largest for part in others), default=0.0)
    if not certain:
        named = ", ".join([f"{PARTS[largest]} {parts[largest].text()}", *listed])
        return Sentence(f"Which part of the {what} is the largest {UNTOLD}: {named} {_UNIT} ({BRACKETS}).")
    text = f"The largest part of the {what} came from {PARTS[largest]}: {parts[largest].text()} {_UNIT}"
    text += f" (beside it {' and '.join(listed)}; {BRACKETS})" if listed else f" ({BRACKETS})"
    against = [
        PARTS[part]
        for part in others
        if parts[part].holds_zero is False and parts[part].value * parts[largest].value < 0
    ]
    if against:
        text += f"; {' and '.join(against)} worked against it"
    return Sentence(text + ".")


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


def write_verdict(
    summary: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    self_checks: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]] = (),
    all_prompts: Sequence[str] = (),
) -> list[Sentence]:
    """The verdict on an analysis, most important first; what failed comes before everything else.

    Parameters are the content of summary.json and training_history.json, run.json's "self_checks", and the
    training rows of sequences.parquet (see ``verdict_attribution``).
    """
    checks = check_sentences(self_checks)
    found = [*training_sentences(history), *prediction_sentences(summary), part_sentence(summary)]
    if lookup(summary, "step_analysed") is not False:
        found += [
            training_noise_sentence(summary),
            *cost_sentences(training, all_prompts, lookup(summary, "leaving_out")),
        ]
    found.append(probe_sentence(history))
    sentences = [sentence for sentence in found if sentence is not None]
    failure = failure_sentence(summary)
    first = [] if failure is None else [failure]
    return [*checks, *first, *sentences] if checks[0].tone == "bad" else [*first, *sentences, *checks]
