"""What a run's log says in sentences: what entropy and reward did, and how the probe's predictions held."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_experiments.records.history import holds_means, probed_sums
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.training_course import entropy_column, entropy_course_words, reward_course_words
from entropy_experiments.statistics.confidence import (
    BRACKETS,
    CLOSE,
    DISAGREE,
    Known,
    Sentence,
    Tone,
    correlation_words,
    gap_word,
)
from entropy_experiments.text.numbers import counted

_UNIT = "nats per token"


def training_sentences(history: Sequence[HistoryRow]) -> list[Sentence]:
    """What entropy and mean reward did over the recorded training steps; a movement only where its interval shows one."""
    if not len(entropy_column(history).steps):
        return [Sentence("What entropy did in training is not known: the folder holds no training history.", "warning")]
    words, _ = entropy_course_words(history)
    found = [Sentence(f"In training entropy {words}.")]
    reward = reward_course_words(history)
    if reward is not None:
        found.append(Sentence(f"In training mean reward {reward}."))
    return found


def probe_sentence(history: Sequence[HistoryRow]) -> Sentence | None:
    """How the probe's predictions held while training, over the steps that have both; None with fewer than two."""
    if holds_means(history):
        return Sentence(
            "What the probe predicted and measured was logged as means over several steps (logging_steps), so that their sums "
            "are not known.",
            "warning",
        )
    sums = probed_sums(history)
    if sums is None or sums.steps < 2:
        return None
    apart, tone = _apart(sums.difference, sums.measured.value)
    text = (
        f"While training, the probe predicted {counted(sums.steps, 'step')}: the predicted changes sum to "
        f"{sums.predicted.text()}, the measured ones to {sums.measured.text()} {_UNIT} ({BRACKETS}); {apart}"
        f"{correlation_words(sums.correlation, sums.steps)}"
    )
    if sums.left_out:
        text += f"; {counted(sums.left_out, 'further step')} measured on too small an effective sample left out"
    if all(row.probe_measured_over is None for row in history):  # not `mode: watch`, whose default has no average
        text += (
            "; where a running average of gradients predicted (averaging above 0), its lag is in none of these errors"
        )
    return Sentence(text + ".", tone)


def _apart(gap: Known | None, measured: float) -> tuple[str, Tone]:
    """Whether both sums agree, of the same prompts; nothing where that is not known."""
    if gap is None or gap.holds_zero is None:
        return "", "plain"
    word = gap_word(gap, measured)
    text = f"on the same prompts they {word}, differing by {gap.text()}"
    if word != DISAGREE:
        return f"{text}; ", "plain"
    part = f", {abs(gap.value / measured):.0%} of the measured sum" if measured else ""
    large = abs(gap.value) > CLOSE * abs(measured)
    return f"{text}{part} (predictions are to first order); ", "bad" if large else "warning"
