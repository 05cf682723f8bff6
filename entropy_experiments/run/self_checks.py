"""The checks that every analysis makes of itself, each a number against a tolerance; see docs/guides/self-checks.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_core.cut_weights import total_of
from entropy_core.formed import PIECE
from entropy_core.scores import TokenStatistics


@dataclass(frozen=True)
class SelfCheck:
    """`passed` is value <= tolerance (a NaN value fails); `explanation` says what was compared and what a failure means, and
    `allows` what would pass, where the tolerance alone does not say it or is wide.
    """

    name: str
    value: float
    tolerance: float
    explanation: str
    allows: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; the absolute error where |expected| is exactly 0."""
    difference = float((found.double() - expected.double()).norm())
    scale = float(expected.double().norm())
    return difference / scale if scale > 0 else difference


def relative_error_of_dicts(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """`relative_error` over all tensors together; infinite where the names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    off = size = 0.0
    for name, tensor in expected.items():  # a piece at a time: vectors may be as large as a model
        pieces = zip(found[name].reshape(-1).split(PIECE), tensor.reshape(-1).split(PIECE), strict=True)
        for one, other in pieces:
            off += float((one.double() - other.double()).square().sum())
            size += float(other.double().square().sum())
    off, size = total_of(off, size)
    difference, scale = off**0.5, size**0.5
    return difference / scale if scale > 0 else difference


def surprisal_z_score(statistics: TokenStatistics) -> float:
    """|z| of the mean of -S_t - sum_k H_k over independent sequences: both estimate H, so it is of order one.

    The variance is the policy's own, sum_k Var[log pi_k], or the sample's where that is larger: late in a collapse the rare
    tokens that carry the variance are usually absent from a sample, whose spread then is far too small. Below a few units in
    the last place of H a gap is rounding: a policy that is exactly uniform has no variance at all.
    """
    gap, error = _surprisal_gap(statistics)
    return gap / error if error > 0 else 0.0


def smallest_seen_gap(statistics: TokenStatistics, z: float) -> float:
    """The part of H by which surprisal must be off before `surprisal_z_score` reaches z: what the check lets through."""
    entropy = float(statistics.entropy_sums().double().mean())
    return z * _surprisal_gap(statistics)[1] / entropy if entropy > 0 else math.inf


def _surprisal_gap(statistics: TokenStatistics) -> tuple[float, float]:
    """|mean(-S - sum H)| and its standard error, nats per completion."""
    gaps = -statistics.scores() - statistics.entropy_sums()
    if statistics.surprisal_variances is None:
        raise ValueError("token statistics were computed without surprisal variances")
    own = float(statistics.surprisal_variances.double().sum()) / len(gaps) ** 2
    sampled = float(gaps.var(correction=1)) / len(gaps) if len(gaps) > 1 else 0.0
    rounding = 32 * torch.finfo(statistics.logprobs.dtype).eps * float(statistics.entropy_sums().mean())
    return abs(float(gaps.mean())), max(own, sampled, rounding**2) ** 0.5
