"""A quiet estimate that is off by a little, put right by the running mean of how far off it was.

    d_u   = reference_u - quiet_u                                   of step u: the reference is unbiased and noisy
    b_s   = sum_{u <= s} w_u d_u,     w_u = keep^(s-u) / sum keep^(s-u')
    x_s   = quiet_s + b_s
    Var x_s = Var(quiet_s) + 2 w_s Cov(quiet_s, d_s) + sum_u w_u^2 Var(d_u) + tau^2 sum_u (w_u - [u = s])^2

tau^2 is how much the bias itself varies from step to step: the spread of the d_u beyond their own
errors (DerSimonian & Laird 1986), never below 0. A running sum of x_s holds d_u with the weight C_u
= sum_s w_u(s), and its variance is

    Var sum = sum_u [Var(quiet_u) + 2 C_u Cov(quiet_u, d_u) + C_u^2 Var(d_u)] + tau^2 sum_u (C_u - 1)^2.

Steps have sequences of their own, so their errors are independent. Units: nats per token (variances
nats^2).
Source: docs/theory/entropy-critic.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.uncertainty import Estimate

_FEWEST_FOR_SPREAD = 3


@dataclass(frozen=True)
class PairedEstimates:
    """One step's quiet estimate and what the reference said beyond it, on the same sequences.

    Attributes:
        quiet: the quiet estimate. difference: reference minus quiet; NaN where there is no
            reference.
        quiet_variance, difference_variance, covariance: of these two, over draws of the step's
            prompts.
        freedom: degrees of freedom behind the variances.
    """

    quiet: float
    difference: float
    quiet_variance: float
    difference_variance: float
    covariance: float
    freedom: float

    @classmethod
    def from_left_out(
        cls, quiet: float, quiet_left_out: Tensor, reference: float, reference_left_out: Tensor
    ) -> PairedEstimates:
        """From both statistics and their (B,) values with each prompt left out, prompts in one
        order.
        """
        count = len(quiet_left_out)
        deviations = torch.stack([quiet_left_out, reference_left_out - quiet_left_out]).double()
        deviations = deviations - deviations.mean(1, keepdim=True)
        products = ((count - 1) / count * (deviations @ deviations.T)).tolist()
        known = count > 1
        return cls(
            quiet,
            reference - quiet,
            products[0][0] if known else math.nan,
            products[1][1] if known else math.nan,
            products[0][1] if known else math.nan,
            max(1, count - 1),
        )


class BiasCorrection:
    """Corrected estimates of steps in a row, and their sum.

    Args:
        keep: weight of an earlier step's difference relative to the next one's; 1 weighs all alike.
    """

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._pairs: list[PairedEstimates] = []
        self._weights = torch.zeros(0, dtype=torch.float64)
        self._in_sum = torch.zeros(0, dtype=torch.float64)
        self._sum = 0.0

    def add(self, pair: PairedEstimates) -> Estimate:
        """The corrected estimate of the next step; without any reference so far the quiet one as it
        is.
        """
        self._pairs.append(pair)
        known = torch.tensor([math.isfinite(pair.difference)], dtype=torch.float64)
        self._weights = torch.cat([self._weights * self._keep, known])
        total = self._weights.sum()
        weights = self._weights / total if float(total) > 0 else self._weights
        self._in_sum = torch.cat([self._in_sum, torch.zeros_like(known)]) + weights
        value = pair.quiet + float(weights @ self._column("difference").nan_to_num())
        self._sum += value
        only_here = torch.zeros_like(weights)
        only_here[-1] = 1.0
        return self._estimate(value, only_here, weights)

    def total(self) -> Estimate:
        """The sum of all corrected estimates so far."""
        return self._estimate(self._sum, torch.ones_like(self._in_sum), self._in_sum)

    @property
    def bias(self) -> float:
        """What is being added back, nats per token; NaN before the first reference."""
        total = float(self._weights.sum())
        return float(self._weights @ self._column("difference").nan_to_num()) / total if total > 0 else math.nan

    def _estimate(self, value: float, of_quiet: Tensor, of_difference: Tensor) -> Estimate:
        """The value of one summary, from the steps that are in it.

        Args:
            of_quiet, of_difference: (n,) how often each step's two numbers are in the value.
        """
        terms = (
            of_quiet.square() * self._column("quiet_variance")
            + 2 * of_quiet * (of_difference * self._column("covariance")).nan_to_num()
            + (of_difference.square() * self._column("difference_variance")).nan_to_num()
        )
        terms = torch.where(of_quiet + of_difference > 0, terms, 0.0).clamp(min=0)
        lag = self._variance_of_bias() * float((of_difference - of_quiet).square().sum())
        variance = float(terms.sum()) + lag
        if not math.isfinite(variance):
            return Estimate(value)
        count = int((self._weights > 0).sum())
        parts = [float(t) ** 2 / p.freedom for t, p in zip(terms, self._pairs, strict=True) if float(t) > 0]
        parts += [lag**2 / max(count - 1, 1)] if lag > 0 else []
        return Estimate(value, math.sqrt(variance), variance**2 / sum(parts) if parts else math.inf)

    def _variance_of_bias(self) -> float:
        """tau^2."""
        known = self._weights > 0
        count = int(known.sum())
        if count < _FEWEST_FOR_SPREAD:
            return 0.0
        weights = self._weights[known] / self._weights[known].sum()
        values, errors = self._column("difference")[known], self._column("difference_variance")[known]
        mean = weights @ values
        left = 1 - weights  # a step is in the mean that it is compared with
        found = (weights @ (values - mean).square() - (weights * left) @ errors) / float(weights @ left)
        return max(0.0, float(found)) if math.isfinite(float(found)) else 0.0

    def _column(self, name: str) -> Tensor:
        return torch.tensor([getattr(pair, name) for pair in self._pairs], dtype=torch.float64)
