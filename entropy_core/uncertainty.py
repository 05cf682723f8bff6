"""Standard errors with prompts as the independent units, and an unbiased product of two means from
one batch.

    ratio statistic      r = sum_p a_p / sum_p b_p                         (b_p = 1: a mean over prompts)
    jackknife            se^2 = (B - 1)/B  sum_p (r_{-p} - mean_p r_{-p})^2,        r_{-p} with prompt p left out
    U-statistic          U = B/(B-1) Xbar.Ybar - 1/(B(B-1)) sum_p X_p.Y_p           E[U] = E[X].E[Y]
    sum of two           se^2 = se_1^2 + se_2^2,      df = se^4 / (se_1^4/df_1 + se_2^4/df_2)

Symbols: B prompts, a_p and b_p sums over prompt p's sequences, X_p and Y_p vectors of the two
sides, df degrees of freedom. All standard errors here are of the *mean*, not the spread of its
summands; intervals are made of them in rl_training.intervals.
Source: Efron & Stein 1981; Welch 1947; docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value, the standard error of it (NaN where nothing is known of its spread) in the same
    unit, and the degrees of freedom behind that error: one less than there are prompts or folds;
    infinite where the error is known.

    Attributes:
        deviations: (F,) whose Euclidean norm is the standard error, one for each fold of prompts.
            Those of estimates on the same folds add up, and so give the error of their sum whatever
            noise they share. Empty where that is not known.
    """

    value: float
    standard_error: float = math.nan
    degrees_of_freedom: float = math.inf
    deviations: tuple[float, ...] = field(default=(), compare=False, repr=False)

    def __add__(self, other: Estimate) -> Estimate:
        """Sum of two independent estimates, with Welch's degrees of freedom."""
        error = math.hypot(self.standard_error, other.standard_error)
        parts = [(e.standard_error / error) ** 4 / e.degrees_of_freedom for e in (self, other)] if error > 0 else []
        return Estimate(self.value + other.value, error, 1 / sum(parts) if sum(parts) > 0 else math.inf)

    def scaled(self, factor: float) -> Estimate:
        """The same times a known number."""
        deviations = tuple(factor * d for d in self.deviations)
        return Estimate(factor * self.value, abs(factor) * self.standard_error, self.degrees_of_freedom, deviations)


def sums_over_prompts(values: Tensor, prompt_index: Tensor) -> Tensor:
    """(N, ...) values -> (B, ...) float64 sums over each prompt's sequences, prompts in ascending
    order.
    """
    _, group = prompt_index.unique(return_inverse=True)
    out = torch.zeros((int(group.max()) + 1, *values.shape[1:]), dtype=torch.float64, device=values.device)
    return out.index_add_(0, group, values.double())


def jackknife_over_prompts(numerators: Tensor, prompt_index: Tensor, denominators: Tensor | None = None) -> float:
    """Standard error of sum(numerators) / sum(denominators), leaving out one prompt at a time.

    Args:
        numerators: (N,) per sequence.
        denominators: (N,) per sequence; by default 1 (a mean over sequences).

    Returns:
        NaN with one prompt: a single unit carries no information about its spread.

    Examples:
        >>> values, prompts = torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1])
        >>> jackknife_over_prompts(values, prompts)  # two prompts, at 1 and 3
        1.0
    """
    if denominators is None:
        denominators = torch.ones_like(numerators)
    return jackknife_standard_error(leave_one_prompt_out(numerators, prompt_index, denominators))


def leave_one_prompt_out(numerators: Tensor, prompt_index: Tensor, denominators: Tensor) -> Tensor:
    """(B,) values of sum(numerators) / sum(denominators) with each prompt left out, prompts in
    ascending order of index.

    The difference of two such statistics over the same prompts has the difference of these as its
    own leave-one-out values, which is what a paired standard error rests on. 0/0, NaN, where one
    prompt is all there is.
    """
    a, b = sums_over_prompts(numerators, prompt_index), sums_over_prompts(denominators, prompt_index)
    return (a.sum() - a) / (b.sum() - b)  # sums without prompt p, for all p at once: no second pass


def contributions_without_each_prompt(prompt_index: Tensor, contributions: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, ...) means of `contributions` with each prompt left out, prompts in ascending order of
    index; float64.

    Args:
        contributions: from the (m,) rows of some sequences to their (m, ...) contributions *as a
            batch of their own*: means that they are centred or divided by, and baselines they feed,
            are those of these rows. What a jackknife of an estimate needs whose summands depend on
            the whole batch. NaN where fewer than two sequences are left, which say nothing of a
            spread.
    """
    rows = torch.arange(len(prompt_index), device=prompt_index.device)
    found = []
    for prompt in prompt_index.unique():
        kept = rows[prompt_index != prompt]
        some = contributions(kept if len(kept) > 1 else rows).double().mean(0)
        found.append(some if len(kept) > 1 else torch.full_like(some, float("nan")))
    return torch.stack(found)


def effective_degrees_of_freedom(deviations: Tensor) -> float:
    """Of a standard error that is the norm of (F,) deviations which add up to 0: F - 1, and fewer,
    at least 1, where one or two make most of it.

    1/df = 1/(F - 1) + max(0, k)/2F with k their excess kurtosis, unbiased for normal values.

    Source: Satterthwaite 1946, as Var(s^2)/s^4 = 2/(F - 1) + k/F;
    entropy_experiments.statistics.jackknife_interval.
    """
    n = len(deviations)
    squares = deviations.double().square()
    if n < 4 or float(squares.sum()) == 0.0:
        return float(max(n - 1, 1))
    plain = float(squares.square().mean() / squares.mean().square()) - 3
    # Fisher's unbiased estimate of the excess kurtosis, from the biased one above.
    excess = ((n + 1) * plain + 6) * (n - 1) / ((n - 2) * (n - 3))
    return max(1.0, 1 / (1 / (n - 1) + max(0.0, excess) / (2 * n)))


def jackknife_standard_error(leave_one_out: Tensor) -> float:
    """Standard error of a statistic from its (B,) values with each unit left out.

    NaN for fewer than two units.
    """
    count = len(leave_one_out)
    if count < 2:
        return float("nan")
    spread = leave_one_out.double() - leave_one_out.double().mean()
    return float(((count - 1) / count * spread.square().sum()).sqrt())


def u_statistic(left: Tensor, right: Tensor) -> float:
    """Unbiased estimate of E[X].E[Y] from B paired vectors, (B, D) each: the product of means
    without its t = t' terms.

    Raises:
        ValueError: fewer than two prompts, or shapes that differ.

    Examples:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> u_statistic(x, x)  # x_1 x_2, without the squares
        2.0
    """
    if left.shape != right.shape or left.dim() != 2:
        raise ValueError(f"both sides must be (B, D), not {tuple(left.shape)} and {tuple(right.shape)}")
    count = left.shape[0]
    if count < 2:
        raise ValueError("a U-statistic needs at least two prompts")
    x, y = left.double(), right.double()
    # All B^2 products less the B on the diagonal, in O(B D).
    total = torch.dot(x.sum(0), y.sum(0)) - (x * y).sum()
    return float(total / (count * (count - 1)))
