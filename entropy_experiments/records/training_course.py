"""What entropy and reward did over training, with an error: the mean of the last third of the steps minus that of the first.

    change = mean over the last m steps of x - mean over the first m,     m = floor(T/3),  T recorded steps, at least six
    from sequences    se^2 = sum_kl rho_kl se_k se_l / m^2 within either third,   rho_kl = max(0, 1 - |k - l| / s):
                      sequences that are watched for s steps are in both k and l, and err alike there; s = 1 where each step
                      has its own. What both thirds have in common would make the error smaller, and is left out
    from scatter      se^2 = s_first^2/m + s_last^2/m: where steps carry no errors; a trend inside a third makes it larger

Degrees of freedom by Welch. Two single steps are not compared: each is a sample of a few prompts. Entropy is that of the
sequences which the probe watched (all that were drawn, or fresh ones) where there was one, else what the trainer logged, which
DrGRPOTrainer logs of a buffer that prompts rewarded alike were left out of; reward is of all prompts, before any was left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from entropy_experiments.records.history_rows import HistoryRow, values_of
from entropy_experiments.statistics.confidence import BRACKETS, Known, change_word
from entropy_experiments.text.numbers import counted, plain
from rl_training.intervals import interval, welch_freedom
from rl_training.probe_config import EntropyProbeConfig

FEWEST_STEPS = 6
_UNIT = "nats per token"
Source = Literal["sequences", "scatter"]


@dataclass(frozen=True)
class Course:
    """start, end: means over the first and the last third; change: end - start with its interval. first, last: (from, to) of the
    steps of either third. source: what the error is made of.
    """

    start: float
    end: float
    change: Known
    first: tuple[float, float]
    last: tuple[float, float]
    source: Source


@dataclass(frozen=True)
class Column:
    """One quantity over training: (T,) steps, values, standard errors and degrees of freedom (NaN where there is none)."""

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    freedoms: np.ndarray
    watched: bool
    """Of sequences before any was left out."""
    kept: int = 1
    """Steps that a sequence is watched for at most; 1: each step has its own."""


def entropy_column(history: Sequence[HistoryRow]) -> Column:
    """Entropy, nats per token: of the sequences that the probe watched, or what the trainer logged."""
    probed = _column(history, "probe_entropy", "probe_entropy_se", "probe_measured_df", True)
    logged = _column(history, "entropy", "entropy_se", "entropy_df", False)
    recorded = [int(row.probe_watched_for) for row in history if row.probe_watched_for is not None]
    if recorded:
        probed = replace(probed, kept=max(recorded))
    elif any(row.probe_measured_over is not None for row in history):  # of an earlier release: a pool's by default
        probed = replace(probed, kept=EntropyProbeConfig().pool_age)
    return probed if len(probed.steps) >= min(FEWEST_STEPS, len(logged.steps)) and len(probed.steps) else logged


def reward_column(history: Sequence[HistoryRow]) -> Column:
    """Mean reward, of all prompts where that was logged."""
    return _column(history, "reward", "reward_se", "reward_df", True)


def unfiltered_points(history: Sequence[HistoryRow]) -> tuple[list[float], list[float], list[float]]:
    """(steps, entropies, rewards) of the steps that have both, from the columns that courses are made of."""
    entropy, reward = entropy_column(history), reward_column(history)
    rewards = dict(zip(reward.steps.tolist(), reward.values.tolist(), strict=True))
    both = [(s, h) for s, h in zip(entropy.steps.tolist(), entropy.values.tolist(), strict=True) if s in rewards]
    return [s for s, _ in both], [h for _, h in both], [rewards[s] for s, _ in both]


def _column(history: Sequence[HistoryRow], value: str, error: str, freedom: str, watched: bool) -> Column:
    rows = sorted((row for row in history if getattr(row, value) is not None), key=lambda row: row.step)
    return Column(*(values_of(rows, name) for name in ("step", value, error, freedom)), watched)


def course(column: Column) -> Course | None:
    """The course of a column; None below FEWEST_STEPS."""
    count = len(column.steps)
    if count < FEWEST_STEPS:
        return None
    m = count // 3
    ends = slice(0, m), slice(count - m, count)
    used = np.r_[ends[0], ends[1]]
    source: Source = (
        "sequences" if (column.errors[used] >= 0).all() and np.isfinite(column.freedoms[used]).all() else "scatter"
    )
    if source == "sequences":
        terms = [_mean_error(column, end) for end in ends]
    else:
        terms = [(float(column.values[end].std(ddof=1)) / math.sqrt(m), m - 1) for end in ends]
    start, end = (float(column.values[e].mean()) for e in ends)
    error = math.hypot(*(e for e, _ in terms))
    low, high = interval(end - start, error, welch_freedom(terms))
    first, last = ((float(column.steps[e][0]), float(column.steps[e][-1])) for e in ends)
    return Course(start, end, Known(end - start, low, high), first, last, source)


def _mean_error(column: Column, end: slice) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean over some steps."""
    steps, errors, freedoms = column.steps[end], column.errors[end], column.freedoms[end]
    shared = np.clip(1 - np.abs(steps[:, None] - steps) / column.kept, 0, None)
    error = math.sqrt(float(errors @ shared @ errors)) / len(errors)
    alone = math.sqrt(float(errors @ errors)) / len(errors)
    freedom = welch_freedom([(e, f) for e, f in zip(errors.tolist(), freedoms.tolist(), strict=True)])
    return error, freedom if error == 0 else max(float(freedoms.min()), freedom * (alone / error) ** 2)


def entropy_course_words(history: Sequence[HistoryRow]) -> tuple[str, bool]:
    """What entropy did, as the end of a sentence "In training entropy ...", and whether anything is claimed."""
    entropy = entropy_column(history)
    found = course(entropy)
    where = (
        "on the probe's sequences, none left out for its reward"
        if entropy.watched
        else "as the trainer logged it, which is of the sequences it trained on"
    )
    if found is None:
        return _too_few(entropy, _UNIT, where), False
    return f"{_moved(found, _UNIT)}, {where}", found.change.holds_zero is False


def reward_course_words(history: Sequence[HistoryRow]) -> str | None:
    """What mean reward did, as the end of a sentence "Mean reward ..."; None where none was recorded."""
    reward = reward_column(history)
    if not len(reward.steps):
        return None
    found = course(reward)
    return _too_few(reward, "") if found is None else _moved(found, "")


def _moved(found: Course, unit: str) -> str:
    word, size = change_word(found.change), f"{found.change.text()} {unit}".rstrip()
    means = f"{plain(found.start)} on average over {_steps(found.first)}, {plain(found.end)} over {_steps(found.last)}"
    by = "" if found.source == "sequences" else ", from the scatter of the steps"
    return f"{word}: {means}, a change of {size} ({BRACKETS}{by})"


def _too_few(column: Column, unit: str, where: str = "") -> str:
    count = len(column.steps)
    if not count:
        return "was not recorded"
    ends = [0] if count == 1 else [0, count - 1]
    said = " and ".join(f"{_one(column, k)} {unit}".rstrip() + f" at step {column.steps[k]:g}" for k in ends)
    said = f"{said}, {where}" if where else said
    return f"was {said}; {counted(count, 'recorded step')} {'is' if count == 1 else 'are'} too few to say what it did"


def _one(column: Column, k: int) -> str:
    value, error, freedom = (float(c[k]) for c in (column.values, column.errors, column.freedoms))
    if not (error >= 0 and math.isfinite(freedom)):
        return plain(value)
    return Known(value, *interval(value, error, freedom)).text(plus=False)


def _steps(span: tuple[float, float]) -> str:
    low, high = span
    return f"step {low:g}" if low == high else f"steps {low:g} to {high:g}"
