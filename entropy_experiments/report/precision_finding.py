"""What the precision that a run was trained in changes of an analysis' numbers, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from entropy_experiments.records.precision_results import PolicyRoundingRecord, StepRoundingRecord
from entropy_experiments.records.summary import Summary
from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.text.numbers import counted, plain, signed

MUCH = 0.1
"""Part of a number by which the precision of training must change it to be a warning."""
_UNIT = "nats per token"
_WITHOUT_COMPARISON = {
    "not_recorded": "What precision the run's passes had is not recorded (TRL trains under bf16 autocast unless told otherwise); "
    "numbers here are of passes without its rounding, and nothing says what it changes.",
    "cut": "What the precision of training changes was not looked at, since the model is cut over processes; numbers here are of "
    "float32. An analysis on one device compares them.",
    "offloaded": "The run had {trained}; what its rounding changes was not looked at, since parts of the model are offloaded.",
    "few_sequences": "The run had {trained}; what its rounding changes was not looked at: it takes two evaluation sequences.",
}
_FINER_WEIGHTS = {
    "stored": "The run's optimizer keeps finer weights than its passes had, and the checkpoint holds these: the analysed step is "
    "theirs, and passes of the run see rounded copies of it.",
    "rounded": "The checkpoint's weights are in half precision and its optimizer's moments are finer: they are rounded copies "
    "of weights that the run kept and the checkpoint lacks. The analysed step is that of the finer weights, from the copies' "
    "gradient; how far the copies are from them is not known.",
}
"""By the record's fields of these names."""


def precision_sentences(summary: Summary) -> Iterator[Sentence]:
    """None where the run was trained in the analysis' own precision."""
    found = summary.training_precision
    if found is None:
        return
    trained = f"weights in {found.weights}" if found.autocast == "no" else f"{found.autocast} mixed precision"
    if found.policy is not None:
        yield _of_policy(found.policy, trained)
    if found.step is not None:
        yield _of_step(found.step)
    if found.not_compared is not None:
        yield Sentence(_WITHOUT_COMPARISON[found.not_compared].format(trained=trained))
    if found.finer_weights is not None:
        rounded = found.finer_weights == "rounded"
        yield Sentence(_FINER_WEIGHTS[found.finer_weights], "warning" if rounded else "plain")


def _of_policy(found: PolicyRoundingRecord, trained: str) -> Sentence:
    of_gradient, of_change = found.gradient, _part(found.predicted, found.predicted_in_training)
    told = [
        None
        if found.logprob is None
        else f"a token's log-probability by {plain(found.logprob, 2)} nats (root mean square)",
        _off("entropy", _part(found.entropy, found.entropy_in_training)),
        None if of_gradient is None else f"its gradient by {plain(100 * of_gradient, 2)}% of its norm",
        _off("the predicted change", of_change),
    ]
    much = any(part is not None and abs(part) > MUCH for part in (of_gradient, of_change))
    listed = ", ".join(part for part in told if part is not None)
    text = (
        f"The run had {trained}; numbers here are without the rounding of its passes. Passes in that precision differ on "
        f"{counted(found.sequences, 'sequence')} ({counted(found.tokens, 'token')}): {listed}."
    )
    return Sentence(text, "warning" if much else "plain")


def _of_step(found: StepRoundingRecord) -> Sentence:
    of_change = _part(found.predicted, found.predicted_in_training)
    what = f"moments in {found.moments}" if found.weights == "float32" else f"weights and moments in {found.moments}"
    text = f"The run's optimizer keeps {what}: the step that it takes itself"
    if found.moved is not None and found.length is not None:
        text += f" moves {plain(100 * found.moved, 2)}% of the weights that the analysed step moves,"
        text += f" is {plain(found.length, 2)} times as long,"
    if found.predicted is not None and found.predicted_in_training is not None:
        text += (
            f" and is predicted to change entropy by {signed(found.predicted_in_training, 2)} in place of "
            f"{signed(found.predicted, 2)} {_UNIT}"
        )
    return Sentence(text + ".", "warning" if of_change is None or abs(of_change) > MUCH else "plain")


def _part(own: float | None, in_training: float | None) -> float | None:
    return None if own is None or in_training is None or own == 0.0 else in_training / own - 1.0


def _off(what: str, part: float | None) -> str | None:
    return None if part is None else f"{what} by {signed(100 * part, 2)}%"
