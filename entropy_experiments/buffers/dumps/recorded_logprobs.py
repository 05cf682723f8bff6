"""Recorded log-probabilities against the policy's: whether a dump is of this policy, this tokenizer and this temperature.

    d_k = log pi(a_k | c_k) - q_k ,   q_k as the sampler reported it; in nats

The same policy in another engine or precision differs by a little at every token (vLLM in bfloat16: some 0.01 to 0.05 nats, a
divergence of some 1e-3). Anything coarser has a cause, and the causes tell themselves apart: a shift by one token agrees when
it is undone, another temperature agrees at that temperature, another tokenizer agrees nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from entropy_core.batch import SequenceBatch
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from rl_training.probe.surprisal import SurprisalCheck, surprisal_sums

Cause = Literal["none", "engine", "not drawn", "shifted", "temperature", "raw", "other model", "other checkpoint"]

ROUNDING = 2e-3
"""Mean |d|, nats, up to which two computations of one policy in float32 agree."""
ENGINE_MEAN, ENGINE_DIVERGENCE = 0.1, 0.02
"""Mean |d| and divergence (nats a token) up to which a difference is that of an engine or a precision, or of a few steps."""
_NOT_DRAWN = -1.0  # log-probability below which the policy did not give a token with the recorded probability 1
_CLEARLY = 0.25  # a cause is named where undoing it takes away three quarters of the difference
_OTHER_MODEL = 0.5  # correlation below which nothing is left of the policy that drew
_TEMPERATURES = np.exp(np.linspace(np.log(0.1), np.log(4.0), 25))
_DIAGNOSED = 32  # sequences of which a cause is looked for


@dataclass(frozen=True)
class LogprobComparison:
    """tokens: compared. mean_difference: of |d|; divergence: mean of exp(d) - 1 - d, an estimate of KL(sampler | policy); both
    nats a token. temperature: the one that agrees, where it is another.
    """

    tokens: int
    mean_difference: float
    divergence: float
    correlation: float
    cause: Cause
    temperature: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether nothing coarser than another engine was found."""
        return self.cause in ("none", "engine", "raw")

    def sentence(self) -> str:
        """What was found, with the figure and the remedy."""
        figure = f"by {self.mean_difference:.2g} nats a token on average ({self.tokens} tokens)"
        off = f"recorded log-probabilities differ from the policy's {figure}"
        match self.cause:
            case "none":
                return f"recorded log-probabilities are the policy's to {self.mean_difference:.1g} nats ({self.tokens} tokens)"
            case "engine":
                return (
                    f"{off}, a divergence of {self.divergence:.1g}: as another engine, precision or a policy a few steps away "
                    "gives"
                )
            case "not drawn":
                return (
                    f"{self.tokens} tokens have the recorded log-probability 0, and {self.mean_difference:.2g} nats less under "
                    "the policy, which agrees on the others: a tool or a template wrote them; give completion_mask"
                )
            case "shifted":
                return f"{off}, and not when they are shifted by one token: sampler_logprobs are off by one"
            case "raw":
                return (
                    f"{off}, and agree at temperature {self.temperature:.3g}: the sampler reported them before its temperature "
                    "(vLLM's logprobs_mode=raw_logprobs), and drew as the analysis does"
                )
            case "temperature":
                return (
                    f"{off}, and agree at temperature {self.temperature:.3g}: set entropy_analysis.sampling.temperature to the "
                    "run's"
                )
            case "other model":
                return (
                    f"{off}, with a correlation of {self.correlation:.2f}: the sequences are of another model or another "
                    "tokenizer"
                )
        return f"{off}, a divergence of {self.divergence:.2g}: the sequences are of another checkpoint than this"


def compare_logprobs(
    model: nn.Module, batch: SequenceBatch, recorded: Sequence[Sequence[float | None] | None], passes: PassSettings
) -> LogprobComparison | None:
    """Hold what was recorded of each sequence's drawn tokens (None: nothing, of a token or of all) against the policy.

    Returns:
        None where nothing was recorded.
    """
    kept = [i for i, values in enumerate(recorded) if values is not None and any(v is not None for v in values)]
    if not kept:
        return None
    given = [np.array([np.nan if v is None else v for v in recorded[i] or ()], dtype=np.float64) for i in kept]
    part = batch.select(kept)
    own = _own(model, part, part.temperature, passes)
    foreign = _not_drawn(own, given)
    if foreign is not None:
        return foreign
    mean, divergence, correlation, count = _figures(own, given)
    found = LogprobComparison(count, mean, divergence, correlation, "none")
    if mean <= ROUNDING:
        return found
    if mean <= ENGINE_MEAN and divergence <= ENGINE_DIVERGENCE:
        return replace(found, cause="engine")
    few = np.unique(np.linspace(0, len(kept) - 1, _DIAGNOSED).round().astype(int)).tolist()
    return _diagnosed(found, model, part.select(few), [given[i] for i in few], passes)


def _not_drawn(own: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> LogprobComparison | None:
    """Tokens recorded at 0 exactly, as dumps fill in where another wrote, where all others are this policy's."""
    left, right = np.concatenate(list(own)), np.concatenate(list(given))
    foreign = (right == 0.0) & (left < _NOT_DRAWN)
    if not foreign.any():
        return None
    mean, divergence, correlation, count = _figures([left[right != 0.0]], [right[right != 0.0]])
    if not count or mean > ENGINE_MEAN or divergence > ENGINE_DIVERGENCE:
        return None
    return LogprobComparison(int(foreign.sum()), float(-left[foreign].mean()), divergence, correlation, "not drawn")


def _own(model: nn.Module, batch: SequenceBatch, temperature: float, passes: PassSettings) -> list[np.ndarray]:
    found = token_statistics(model, replace(batch, temperature=temperature), passes)
    return [row[m].double().cpu().numpy() for row, m in zip(found.logprobs, batch.completion_mask, strict=True)]


def _diagnosed(
    found: LogprobComparison, model: nn.Module, batch: SequenceBatch, given: list[np.ndarray], passes: PassSettings
) -> LogprobComparison:
    own = _own(model, batch, batch.temperature, passes)
    mean = _figures(own, given)[0]
    for by in (1, -1):
        left = [values[max(0, by) : len(values) + min(0, by)] for values in own]
        right = [values[max(0, -by) : len(values) + min(0, -by)] for values in given]
        if sum(map(len, left)) and _figures(left, right)[0] < _CLEARLY * mean:
            return replace(found, cause="shifted")

    def off(temperature: float) -> float:
        return _figures(_own(model, batch, temperature, passes), given)[0]

    best = min(map(float, _TEMPERATURES), key=off)
    low, high = best / 1.2, best * 1.2
    for _ in range(12):  # golden section: |d| has one minimum in the temperature
        left_t, right_t = high - 0.618 * (high - low), low + 0.618 * (high - low)
        low, high = (low, right_t) if off(left_t) < off(right_t) else (left_t, high)
    solved = (low + high) / 2
    if abs(solved / batch.temperature - 1) > 0.02 and off(solved) < _CLEARLY * mean:
        raw = abs(solved - 1.0) < 0.02 and _likelier_here(model, batch, passes)
        return replace(found, cause="raw" if raw else "temperature", temperature=solved)
    return replace(found, cause="other model" if found.correlation < _OTHER_MODEL else "other checkpoint")


def _likelier_here(model: nn.Module, batch: SequenceBatch, passes: PassSettings) -> bool:
    """Whether the tokens look drawn at the batch's temperature rather than at 1."""
    at_one = drawn_by(model, replace(batch, temperature=1.0), passes)
    return abs(drawn_by(model, batch, passes).z) < abs(at_one.z)


def _figures(own: Sequence[np.ndarray], given: Sequence[np.ndarray]) -> tuple[float, float, float, int]:
    left, right = np.concatenate(list(own)), np.concatenate(list(given))
    known = np.isfinite(right)
    left, right = left[known], right[known]
    if not len(left):
        return np.inf, np.inf, 0.0, 0
    d = left - right
    spread = left.std() * right.std()
    correlation = float(((left - left.mean()) * (right - right.mean())).mean() / spread) if spread > 0 else 1.0
    # exp of a huge difference says no more than a large one
    return float(np.abs(d).mean()), float((np.exp(np.minimum(d, 20.0)) - 1 - d).mean()), correlation, len(d)


def drawn_by(model: nn.Module, batch: SequenceBatch, passes: PassSettings) -> SurprisalCheck:
    """Whether the policy can have drawn these completions, from their surprisal and entropy alone."""
    check = SurprisalCheck()
    statistics = token_statistics(model, batch, passes, with_variances=True)
    check.add(*map(float, surprisal_sums(statistics, batch).tolist()))
    return check
