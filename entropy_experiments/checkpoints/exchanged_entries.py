"""Whether two entries of `optimizer.pt` have changed places with each other: two among many, which no shape and no share shows.

With fresh gradients (`exchanged_by_gradients`): for two parameters i, j of one shape, log v_i - log v_j follows
log g_i^2 - log g_j^2, element by element. The correlation of the two differences is positive in a right mapping, and the same
number with the other sign once v_i and v_j are exchanged.

Without any pass (`exchanged_factors`), for LoRA's W + s B A:

    A grows by no sum that is known, but B starts at 0:    B_t = - sum_k lr_k P_k m_k    looks like  -m_B / sqrt(v_B)
    A -> R A, B -> B R^-1 leaves the policy as it is:      (dL/dA) A^T = B^T (dL/dB)      so that m_A A^T looks like B^T m_B

Each says of every pair of modules how well the moments of one fit the weights of the other. Only clear evidence counts: noise
makes siblings look alike, and a right checkpoint must never be refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from entropy_experiments.checkpoints.adapter_file import LoraFactor
from rl_training.errors import UserError

# Elements of a parameter that are looked at: correlations are then known to 0.02.
_ELEMENTS = 2048
_FEWEST = 64
# An exchanged pair's correlation lies below _LOW (and 4 standard errors) for elements, below _LOW_PROFILE for rows and columns.
# The median of other pairs lies above _WORKS (else gradients say nothing), the pair 4 of their standard deviations below their
# mean. In right mappings of tiny policies, after 10 to 40 steps, the lowest of 900 pairs had -0.08 and -0.23, and the median pair
# 0.3 to 0.6.
_LOW, _LOW_PROFILE, _WORKS, _DEVIATIONS = -0.2, -0.3, 0.2, 4.0
# What the moments of the other module must reach on both sides (and 4 standard errors: B^T m_B of rank 4 has 16 numbers, whose
# cosine is known to 0.25), how far above those of 95 of 100 other pairs, and how far below it the own ones must lie.
_FIT, _ABOVE_OTHERS, _OWN = 0.3, 5.0, 0.5
_FEWEST_OTHERS = 10
# Ranks of a factor, and modules of one shape, that are looked at.
_RANKS, _MOST = 16, 256


def exchanged_by_gradients(
    squares: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> tuple[tuple[str, str] | None, int, int]:
    """(the pair whose entries most clearly changed places, or None; how many pairs certainly did not; of how many).

    squares: name -> v; gradients: name -> a loss gradient at the checkpoint, of the same shape.
    """
    found: list[tuple[float, int, tuple[str, str]]] = []
    pairs = 0
    for names in _same_shaped(gradients).values():
        v = [_logarithms(squares[name]) for name in names]
        g = [_logarithms(gradients[name].square()) for name in names]
        for i, j in combinations(range(len(names)), 2):
            both = torch.isfinite(v[i] + v[j] + g[i] + g[j])
            pairs, count = pairs + 1, int(both.sum())
            if count >= _FEWEST:
                found.append((_correlation((v[i] - v[j])[both], (g[i] - g[j])[both]), count, (names[i], names[j])))
    straight = sum(c >= max(-_LOW, _DEVIATIONS / count**0.5) for c, count, _ in found)
    for correlation, count, pair in sorted(found):
        if correlation > _LOW:
            break
        if correlation > -_DEVIATIONS / count**0.5:
            continue
        others = torch.tensor([c for c, _, names in found if not set(names) & set(pair)])
        if len(others) < _FEWEST_OTHERS or float(others.median()) < _WORKS:
            continue
        if correlation > float(others.mean() - _DEVIATIONS * others.std()):
            continue
        if gradients[pair[0]].dim() < 2 or _profile_correlation(squares, gradients, pair) <= _LOW_PROFILE:
            return pair, straight, pairs
    return None, straight, pairs


def _same_shaped(tensors: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_shape[tuple(tensor.shape)].append(name)
    return by_shape


def _logarithms(squares: Tensor) -> Tensor:
    """Of every k-th element, in float64; -inf for 0."""
    flat = squares.detach().flatten()
    return flat[:: -(-len(flat) // _ELEMENTS)].double().cpu().log()


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-300))


def _profile_correlation(
    squares: Mapping[str, Tensor], gradients: Mapping[str, Tensor], pair: tuple[str, str]
) -> float:
    """Correlation of the differences between the pair's log means along rows and columns."""

    def difference(of: Callable[[str], Tensor]) -> Tensor:
        profiles = []
        for name in pair:
            matrix = of(name).detach().double().flatten(1).cpu()
            logs = [(matrix.mean(axis) + 1e-30).log() for axis in (1, 0)]
            profiles.append(torch.cat([(part - part.mean()) / len(part) ** 0.5 for part in logs]))
        return profiles[0] - profiles[1]

    v, g = difference(lambda name: squares[name]), difference(lambda name: gradients[name].square())
    return float((v @ g) / (v.norm() * g.norm()).clamp(min=1e-300))


def exchanged_factors(
    modules: Sequence[tuple[LoraFactor, LoraFactor]], moments: Callable[[str], tuple[Tensor, Tensor]]
) -> tuple[str, str] | None:
    """Names of the two factors of LoRA whose entries most clearly changed places; None without clear evidence.

    modules: A (r, in) and B (out, r) of every module; moments: name -> (exp_avg, exp_avg_sq).
    """
    by_rank: dict[int, list[tuple[LoraFactor, LoraFactor]]] = defaultdict(list)
    for a, b in modules:
        if a.weight.dim() == b.weight.dim() == 2 and len(a.weight) == b.weight.shape[1]:
            by_rank[len(a.weight)].append((a, b))
    kinds: dict[str, list[_Fit]] = {"path": [], "A": [], "B": []}
    for pairs in by_rank.values():
        kinds["path"] += _fits_of_b([b for _, b in pairs], moments)
        kinds["A"] += _fits_of_products(pairs, 0, moments)
        kinds["B"] += _fits_of_products(pairs, 1, moments)
    found = (_outstanding(fits) for fits in kinds.values())
    return next((pair for pair in found if pair is not None), None)


@dataclass(frozen=True)
class _Fit:
    """Of two modules: crossed, the lesser of the two cosines of one's moments with the other's weights; own, the larger of the
    two with its own; numbers: how many a cosine is of.
    """

    names: tuple[str, str]
    crossed: float
    own: float
    numbers: int


def _outstanding(fits: list[_Fit]) -> tuple[str, str] | None:
    """The pair that fits crosswise, far better than other pairs do and than it fits straight."""
    for fit in sorted(fits, key=lambda fit: -fit.crossed):
        if not fit.crossed >= _FIT:
            return None
        if fit.crossed < _DEVIATIONS / fit.numbers**0.5:
            continue
        others = [other.crossed for other in fits if not set(other.names) & set(fit.names)]
        if len(others) < _FEWEST_OTHERS or fit.crossed < _ABOVE_OTHERS * float(torch.tensor(others).quantile(0.95)):
            return None
        if fit.own <= _OWN * fit.crossed:
            return fit.names
    return None


def _fits(names: list[str], cosines: Tensor, numbers: int) -> list[_Fit]:
    """cosines: [k, l] of the moments of l with the weights of k, each over so many numbers."""
    values = cosines.tolist()
    return [
        _Fit((names[i], names[j]), min(values[i][j], values[j][i]), max(values[i][i], values[j][j]), numbers)
        for i, j in combinations(range(len(names)), 2)
    ]


def _fits_of_b(factors: list[LoraFactor], moments: Callable[[str], tuple[Tensor, Tensor]]) -> list[_Fit]:
    """B against the direction of its last step, -m / sqrt(v)."""
    fits = []
    values = {b.name: b.weight.float().flatten() for b in factors}
    for names in _same_shaped({b.name: b.weight for b in factors}).values():
        steps = []
        for name in names[:_MOST]:
            m, v = (moment.float() for moment in moments(name))
            steps.append(-(m / (v.sqrt() + 1e-30)).flatten())
        weights = torch.stack([values[name] for name in names[:_MOST]])
        fits += _fits(names[:_MOST], _unit(weights) @ _unit(torch.stack(steps)).T, weights.shape[1])
    return fits


def _fits_of_products(
    modules: list[tuple[LoraFactor, LoraFactor]], side: int, moments: Callable[[str], tuple[Tensor, Tensor]]
) -> list[_Fit]:
    """m_A A^T against B^T m_B, both (r, r) cut to _RANKS, with the moments of A (side 0) or of B (side 1) exchanged."""

    def product(which: int, weight: Tensor, of: str) -> Tensor:
        w, m = weight.float(), moments(of)[0].float()
        return (m[:_RANKS] @ w[:_RANKS].T if which == 0 else w[:, :_RANKS].T @ m[:, :_RANKS]).flatten()

    fits = []
    for names in _same_shaped({pair[side].name: pair[side].weight for pair in modules}).values():
        mine = [pair for pair in modules if pair[side].name in set(names[:_MOST])]
        rows, numbers = [], 0
        for pair in mine:
            other = product(1 - side, pair[1 - side].weight, pair[1 - side].name)
            numbers = other.numel()
            moved = torch.stack([product(side, pair[side].weight, p[side].name) for p in mine])
            rows.append(_unit(moved) @ (other / other.norm().clamp(min=1e-30)))
        fits += _fits([pair[side].name for pair in mine], torch.stack(rows), numbers)
    return fits


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def exchange_refused(where: str, pair: tuple[str, str]) -> UserError:
    """The error for a pair whose entries changed places."""
    return UserError(
        f"{where}: the entries of {pair[0]!r} and {pair[1]!r} have changed places (the moments of each look like the other's, "
        "and no other two do): the file was altered, or its entries are in another order than the model's parameters; copy the "
        "checkpoint again, or analyse without the optimizer's state by entropy_analysis.fisher_kernel.preconditioning=none"
    )
