"""What a run's log says in sentences: what entropy and reward did, and how the probe's predictions held."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_experiments.records.history import holds_means, probed_sums
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.training_course import entropy_column, entropy_course_words, reward_course_words
from entropy_experiments.statistics.confidence import BRACKETS, Sentence, correlation_words
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
    apart = "" if sums.difference is None else f"on the same prompts they differ by {sums.difference.text()}; "
    text = (
        f"While training, the probe predicted {counted(sums.steps, 'step')}: the predicted changes sum to "
        f"{sums.predicted.text()}, the measured ones to {sums.measured.text()} {_UNIT} ({BRACKETS}); {apart}"
        f"{correlation_words(sums.correlation, sums.steps)}"
    )
    if sums.left_out:
        text += f"; {counted(sums.left_out, 'further step')} measured on too small an effective sample left out"
    return Sentence(text + ".")
