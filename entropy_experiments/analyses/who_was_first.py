"""Which training sequence, and which prompt, moved entropy most: and would other evaluation prompts have said so too?

    x_u(b) = sum_{i in u} ( sum_t b_t A_ti - h_b sum_t b_t B_ti ) / sum_t b_t T_t,        h_b = sum_t b_t H_t / sum_t b_t T_t
    first in  = the fraction of bootstraps b in which u has the lowest (highest) x_u(b)

x_u is the effect of leaving unit u out of the step, or its accounting share (entropy_experiments.step.effects_of_leaving_out says
which). b counts how often each evaluation prompt was drawn, with replacement, with all its sequences; everything that rests on
the evaluation buffer (its entropy, its lengths) is that of the draw. A, B: what evaluation sequence t adds, h its entropy per
token. Equal training sequences are one unit with the sum of their numbers: they would tie for ever.

Where no unit is first in more than half of the bootstraps there is no first one, but a set of units that holds the first place in
nine of ten. Source: docs/analyses/attribution.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.step.effects_of_leaving_out import Contributions

BOOTSTRAPS = 1000
SET_LEVEL = 0.9
# Rounding of float32 products; another gradient of entropy or another metric would be far above.
_SAME_NUMBER = 1e-2


def numbers_of_draws(
    counts: np.ndarray, parts: Contributions, prompts: np.ndarray, entropy_sums: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """(R, N) the numbers of N training sequences by R draws of evaluation prompts, nats per token.

    counts: (R, B) how often each of B prompts was drawn, prompts in ascending order; prompts, entropy_sums, lengths: (n,) of each
    evaluation sequence.
    """
    per_completion = parts.per_completion.cpu().numpy()
    _, group = np.unique(prompts, return_inverse=True)

    def summed(values: np.ndarray) -> np.ndarray:
        out = np.zeros((counts.shape[1], *values.shape[1:]))
        np.add.at(out, group, values)
        return out

    tokens = counts @ summed(lengths)
    found = counts @ summed(per_completion)
    if parts.per_token is not None:
        h = entropy_sums.sum() / lengths.sum()
        # (A - h B) n / sum T is what was contracted per token
        taken_off = (per_completion - parts.per_token.cpu().numpy() * lengths.mean()) / max(h, 1e-300)
        found -= (counts @ summed(entropy_sums) / tokens)[:, None] * (counts @ summed(taken_off))
    return found / tokens[:, None]


def who_was_first(
    values: np.ndarray,
    draw: np.ndarray,
    units: Mapping[str, np.ndarray],
    left_out: np.ndarray,
) -> dict[str, Any]:
    """values: (N,) numbers of the training sequences. draw: (R, N) the same by bootstrap. units: name -> (N,) unit of each.
    left_out: (B, N) the same with each evaluation prompt left out, of which 95% intervals are made.

    Returns {"bootstraps", "evaluation_prompts", name -> {"lowering", "raising"}} with, for either direction, None where no unit
    moves entropy that way, or {"rows": the sequences of the unit that is first, "value": its number, "low" and "high" of that,
    "first_in": in what part of the bootstraps it is first, "set": {"rows": a list of sequences for every unit of the smallest set
    that is first in SET_LEVEL of them, "value", "low", "high", "first_in"}}.
    """
    found: dict[str, Any] = {"bootstraps": len(draw), "evaluation_prompts": len(left_out)}
    for name, unit in units.items():
        members, of = np.unique(unit, return_inverse=True)
        sums = np.bincount(of, values, minlength=len(members))
        by_draw, without = (
            np.stack([np.bincount(of, row, minlength=len(members)) for row in table]) for table in (draw, left_out)
        )
        rows = [np.flatnonzero(of == u).tolist() for u in range(len(members))]
        found[name] = {
            word: _first(sign * sums, sign * by_draw, rows, sign, without)
            for word, sign in (("lowering", 1), ("raising", -1))
        }
    return found


def _first(
    sums: np.ndarray, draw: np.ndarray, rows: list[list[int]], sign: int, without: np.ndarray
) -> dict[str, Any] | None:
    """Of the lowest sum, which must be below 0. without: (B, U) sums, their sign as it is."""
    first = int(np.argmin(sums))
    if not sums[first] < 0:
        return None
    lowest = draw.argmin(1)
    wins = np.bincount(lowest[draw[np.arange(len(draw)), lowest] < 0], minlength=len(sums)) / len(draw)
    order = np.argsort(-wins, kind="stable")
    needed = int(np.searchsorted(np.cumsum(wins[order]), min(SET_LEVEL, wins.sum()) - 1e-12)) + 1
    kept = [int(u) for u in order[:needed] if wins[u] > 0]

    def number(chosen: list[int]) -> dict[str, float | None]:
        value = float(sign * sums[chosen].sum())
        ends = ends_of(value, without[:, chosen].sum(1))
        return {"value": value, "low": ends["low"], "high": ends["high"]}

    return {
        "rows": rows[first],
        **number([first]),
        "first_in": float(wins[first]),
        "set": {
            "rows": [rows[u] for u in kept],
            **number(kept),
            "first_in": float(wins[kept].sum()),
        },
    }


def bootstrap_counts(prompts: int, draws: int = BOOTSTRAPS, seed: int = 0) -> np.ndarray:
    """(draws, prompts) how often each prompt is drawn, with replacement."""
    generator = np.random.default_rng([seed, 2])
    return generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws).astype(np.float64)


def why_not_these(values: np.ndarray, of_all: np.ndarray) -> str | None:
    """Why the contracted numbers are not those that they are to explain; None where they are. of_all: (N,) with every evaluation
    prompt drawn once.
    """
    largest = float(np.abs(values).max(initial=0.0))
    gap = float(np.abs(values - of_all).max(initial=0.0))
    if gap <= _SAME_NUMBER * largest:
        return None
    return (
        f"the kernel's rows give other numbers than the step's own (by {gap / max(largest, 1e-300):.0%} of the largest)"
    )
