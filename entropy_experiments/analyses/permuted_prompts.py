"""Does one of two buffers tend to have the larger values? A permutation test over prompts, the independent units.

    A   = P(x_right > x_left) + P(x_right = x_left)/2     over all pairs
    z   = |A - 1/2| / se                                  se: a jackknife over prompts, both sides' in quadrature, or over prompts
                                                          jointly where the buffers share some
    p   = part of the allocations of prompts to the two sides, the observed one among them, whose z is as large

Prompts keep their sequences together. One that is on both sides changes places with itself; all others are allocated to as
many places on either side as there were. Exact where prompts are exchangeable; dividing by the error keeps the level, for many
prompts, where the two sides have values of unequal spread about the same middle. Student's t in place of the allocations rejects
7% of equal buffers of six prompts a side, and 2% at 1.25%, which is what counts for the smallest of four p-values.

Sources: Mann & Whitney 1947; Neubert & Brunner, Computational Statistics & Data Analysis 51 (2007); docs/analyses/buffers.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

ALLOCATIONS = 1999
_BLOCK = 2_000_000
_SAME = 1e-9  # relative: allocations that tie are as large


@dataclass(frozen=True)
class Superiority:
    """A, its standard error over prompts, and the p-value of A = 1/2. p_value is None where all values are equal."""

    value: float
    standard_error: float
    p_value: float | None


def superiority(
    left: np.ndarray, right: np.ndarray, left_prompts: np.ndarray, right_prompts: np.ndarray, seed: int = 0
) -> Superiority | None:
    """Of (n,) and (m,) values with the prompt of each. None where a side has a single prompt: nothing is known of its spread."""
    members = np.union1d(left_prompts, right_prompts)
    keys = np.concatenate([np.searchsorted(members, side) for side in (left_prompts, right_prompts)])
    is_right = np.repeat([False, True], [len(left), len(right)])
    units, of = np.unique(keys * 2 + is_right, return_inverse=True)
    prompt, place = units // 2, (units % 2).astype(bool)
    if min(place.sum(), (~place).sum()) < 2:
        return None
    wins, counts = _wins(np.concatenate([left, right]), of, len(units)), np.bincount(of).astype(np.float64)
    value, error = (float(x[0]) for x in _studentised(place[None], wins, counts, prompt))
    if np.ptp(wins / np.outer(counts, counts)) == 0:
        return Superiority(value, error, None)
    sizes = _sizes(np.array([value]), np.array([error]))
    found = np.concatenate(
        [_sizes(*_studentised(block, wins, counts, prompt)) for block in _allocations(place, prompt, seed)]
    )
    return Superiority(value, error, float((found >= sizes[0] * (1 - _SAME)).mean()))


def _wins(values: np.ndarray, of: np.ndarray, units: int) -> np.ndarray:
    """(U, U): how many pairs the row's unit wins against the column's, ties half."""
    found = np.empty((units, units))
    for unit in range(units):
        own = np.sort(values[of == unit])
        below = (np.searchsorted(own, values, "left") + np.searchsorted(own, values, "right")) / 2
        found[:, unit] = np.bincount(of, below, minlength=units)
    return found


def _studentised(
    right: np.ndarray, wins: np.ndarray, counts: np.ndarray, prompt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(A, its standard error), (R,) each, of (R, U) allocations."""
    x, y = right.astype(np.float64), (~right).astype(np.float64)
    of_right, of_left = (
        x * (y @ wins.T),
        y * (x @ wins),
    )  # pairs won by each unit of the right, and against each of the left
    total, n_right, n_left = of_right.sum(1, keepdims=True), x @ counts, y @ counts
    value = total[:, 0] / (n_right * n_left)
    by_prompt = np.equal.outer(prompt, np.unique(prompt)).astype(np.float64)  # (U, B)
    both = by_prompt.sum(0) > 1
    lost = (of_right + of_left) @ by_prompt
    if both.any():  # a prompt's pairs with itself were counted twice
        pairs = [np.flatnonzero(column) for column in by_prompt.T[both]]
        own = [x[:, u] * y[:, v] * wins[u, v] + x[:, v] * y[:, u] * wins[v, u] for u, v in pairs]
        lost[:, both] -= np.stack(own, 1)
    rest = (n_right[:, None] - (x * counts) @ by_prompt) * (n_left[:, None] - (y * counts) @ by_prompt)
    left_out = (total - lost) / rest
    groups = [np.ones_like(left_out)] if both.any() else [x @ by_prompt, y @ by_prompt]
    variance = np.zeros(len(right))
    for group in groups:
        number = group.sum(1)
        mean = (group * left_out).sum(1) / number
        variance += (number - 1) / number * (group * np.square(left_out - mean[:, None])).sum(1)
    return value, np.sqrt(np.where(variance < 1e-24, 0.0, variance))


def _sizes(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """|A - 1/2| over its error; infinite where the sides do not overlap."""
    distance = np.abs(value - 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance < 1e-12, 0.0, distance / error)


def _allocations(place: np.ndarray, prompt: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Blocks of (R, U) allocations, the observed one first; all of them where these are few."""
    units = len(place)
    alone = np.flatnonzero(np.equal.outer(prompt, prompt).sum(1) == 1)
    pairs = np.setdiff1d(np.arange(units), alone).reshape(-1, 2)  # units are ordered by prompt
    to_right = int(place[alone].sum())
    ways = math.comb(len(alone), to_right) * 2 ** len(pairs)
    if ways <= ALLOCATIONS + 1:
        every = []
        for chosen in combinations(range(len(alone)), to_right):
            for swapped in range(2 ** len(pairs)):
                one = place.copy()
                one[alone] = False
                one[alone[list(chosen)]] = True
                flips = np.array([swapped >> k & 1 for k in range(len(pairs))], dtype=bool)
                one[pairs[flips]] = ~one[pairs[flips]]
                every.append(one)
        yield np.array(every)
        return
    rng, left = np.random.default_rng(seed), ALLOCATIONS
    yield place[None]
    while left:
        size = min(left, max(1, _BLOCK // units))
        block = np.repeat(place[None], size, 0)
        block[:, alone] = rng.permuted(block[:, alone], axis=1)
        flips = rng.random((size, len(pairs))) < 0.5
        block[:, pairs] ^= flips[..., None]
        left -= size
        yield block
