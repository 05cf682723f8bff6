"""What an analysis found, in plain sentences: the same ones on the console and at the head of the report.

Every sentence is computed from the stored numbers by a pure function, and says when a number is missing or is too uncertain to
carry a statement. Which words for which evidence is decided in entropy_experiments.statistics.confidence, whether predicted and
measured changes agree in entropy_experiments.statistics.agreement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.estimates import Measurement
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.check_words import check_sentences
from entropy_experiments.report.precision_finding import precision_sentences
from entropy_experiments.report.price_finding import next_step_sentence
from entropy_experiments.report.training_verdict import probe_sentence, training_sentences
from entropy_experiments.report.verdict_attribution import cost_sentences, training_noise_sentence
from entropy_experiments.statistics.agreement import Agreement
from entropy_experiments.statistics.confidence import (
    AGREE,
    BRACKETS,
    NOT_FROM_ZERO,
    UNTOLD,
    UNTRUSTED,
    Known,
    Sentence,
    agreement_sentence,
    agreement_tone,
    few_prompts_sentence,
)
from entropy_experiments.text.display import quoted
from entropy_experiments.text.numbers import plain

PARTS = {
    "batch": "this step's batch",
    "momentum": "momentum (earlier batches)",
    "weight_decay": "weight decay",
}
_UNIT = "nats per token"
_LOSS_UNKNOWN = (
    "The checkpoint does not say which loss its run had: the step analysed is Dr. GRPO's (advantages not divided by their "
    "deviation, a constant length, no KL term), on groups whose rewards differ. Where the run had another, give its own "
    "sequences with their weights (entropy_analysis.sampling.train_sequences_path)."
)


def prediction_sentences(summary: Summary) -> list[Sentence]:
    """How well the analysed step's change was predicted, and what weakens the comparison."""
    found, notes = [], summary.sampling.notes
    if not summary.rows_drawn:
        text = (
            "The evaluation sequences are given texts, not drawn from the policy: changes are of the entropy on their "
        )
        found.append(Sentence(f"{text}tokens, not of the policy's.", "warning"))
    if notes:
        found.append(Sentence(f"Sequences were recorded, not drawn here: {'; '.join(notes)}.", "warning"))
    if not summary.step_analysed:
        text = (
            "The training sequences have neither weights nor rewards, so there is no step: the kernel is all there is."
        )
        return [*found, Sentence(text)]
    if summary.policy.training is None and summary.sampling.training.rounds:
        found.append(Sentence(_LOSS_UNKNOWN, "warning"))
    buffer = "the training sequences of this analysis" if notes else "a fresh training buffer"
    where = f"The next step from checkpoint {summary.checkpoint.step}, on {buffer},"
    value = None if summary.prediction is None else summary.prediction.total.known()
    measured = summary.measured
    actual = None if measured is None else measured.known()
    if value is None:
        return [*found, Sentence(f"{where} has no predicted change of entropy in this folder.", "bad")]
    if value.value == 0.0:
        return [*found, Sentence(f"{where} changes nothing to first order: was its learning rate 0?", "warning")]
    text = f"{where} was predicted to change entropy by {value.text()} {_UNIT}"
    if actual is None or measured is None:
        return [*found, Sentence(f"{text}; what it did change was not measured.", "warning")]
    compared = _compared_sentence(
        f"{text}; measured was {actual.text()} ({BRACKETS}).",
        value,
        actual,
        summary.compared,
        not measured.trustworthy,
    )
    return [*found, compared, *(Sentence(words, "warning") for words in _weaknesses(summary, value, measured))]


def _compared_sentence(text: str, value: Known, actual: Known, compared: Agreement | None, untrusted: bool) -> Sentence:
    """`text`, and whether the two numbers in it agree. untrusted: the measurement, of whose error nothing is known."""
    if compared is not None:
        return Sentence(f"{text} {agreement_sentence(compared, actual.value)}", agreement_tone(compared, actual.value))
    if untrusted:
        return Sentence(f"{text} Whether they {AGREE} {UNTOLD}: {UNTRUSTED}.", "warning")
    unknown = value.holds_zero is None or actual.holds_zero is None
    why = "Without standard errors of both" if unknown else "Without the error of their difference"
    return Sentence(f"{text} {why}, whether they {AGREE} cannot be said.", "warning")


def _weaknesses(summary: Summary, value: Known, measured: Measurement) -> Iterator[str]:
    """What weakens the comparison of the predicted change with the measured one."""
    if value.holds_zero:
        yield (
            f"The prediction itself {NOT_FROM_ZERO} (its 95% interval holds it), so that agreement says little: analyse with "
            "more evaluation prompts."
        )
    effective, n = measured.effective_sample_size, measured.n
    if effective is not None and n and effective < 0.5 * n:
        yield (
            f"The measured change is not to be trusted: reweighting left an effective sample of {plain(effective)} of {n} "
            "sequences, less than half."
        )
    numbers = {"predicted": summary.prediction and summary.prediction.total, "measured": measured}
    freedoms = {name: number and number.degrees_of_freedom for name, number in numbers.items()}
    if warning := few_prompts_sentence(summary.sampling.evaluation.prompts, freedoms):
        yield warning


def part_sentence(summary: Summary) -> Sentence | None:
    """Which of batch, momentum and weight decay moved entropy; None where the split is not known."""
    predicted = summary.prediction
    if predicted is None:
        return None
    found = {part: getattr(predicted, part).known() for part in PARTS}
    largest = None if summary.estimator is None else summary.largest_part.get(summary.estimator)
    return parts_sentence(
        {part: number for part, number in found.items() if number is not None},
        "predicted change",
        None if largest is None else largest.certain,
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


def failure_sentence(errors: Mapping[str, str]) -> Sentence | None:
    """Which analyses failed, by name and with what; None where none did. errors: name -> what went wrong."""
    failed = [f"{name.replace('_', ' ')} ({quoted(error, 200)[1:-1]})" for name, error in errors.items()]
    if not failed:
        return None
    number = "1 analysis" if len(failed) == 1 else f"{len(failed)} analyses"
    return Sentence(
        f"{number} FAILED and {'is' if len(failed) == 1 else 'are'} missing below: {'; '.join(failed)}.", "bad"
    )


def write_verdict(results: ResultsFolder) -> list[Sentence]:
    """The verdict on an analysis, most important first; what failed comes before everything else.

    Every sentence names its source. `Sentence.lead`: what went wrong, what entropy did, whether the step was predicted, its
    largest part, who cost most, and what to do next.
    """
    summary = results.summary
    checks = with_source("run.json: self_checks", check_sentences(results.run.self_checks))
    failed = with_source("summary.json: analyses", [failure_sentence(summary.analyses.failed())])
    found = with_source("training_history.json", training_sentences(results.history), lead=1)
    found += with_source("summary.json: predicted, actual, agreement", prediction_sentences(summary), lead=4)
    found += with_source("summary.json: predicted, largest_part", [part_sentence(summary)], lead=1)
    if summary.step_analysed:
        prompts = [row["prompt"] for row in [*results.training, *results.evaluation]]
        costs = cost_sentences(results.training, prompts, summary.leaving_out)
        found += with_source("summary.json: training_noise", [training_noise_sentence(summary)])
        found += with_source(
            "sequences.parquet: delta_h, effect_of_leaving_out; summary.json: leaving_out", costs, lead=1
        )
    found += with_source("summary.json: training_precision", precision_sentences(summary))
    prices = finished(summary.analyses.prices)
    if prices is not None:
        found += with_source("summary.json: analyses.prices", [next_step_sentence(prices)])
    found += with_source("training_history.json: entropy_probe/predicted, measured", [probe_sentence(results.history)])
    return [*checks, *failed, *found] if checks[0].tone == "bad" else [*failed, *found, *checks]


def with_source(source: str, sentences: Iterable[Sentence | None], lead: int = 0) -> list[Sentence]:
    """Those that there are, with their source; the first `lead` of them, and what is bad, are for the first screen."""
    there = [sentence for sentence in sentences if sentence is not None]
    return [
        replace(sentence, source=source, lead=place < lead or sentence.tone == "bad")
        for place, sentence in enumerate(there)
    ]
