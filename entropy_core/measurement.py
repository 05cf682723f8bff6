"""The entropy change that an update really made, measured on tokens drawn before it.

    omega_t = exp(S_t(theta') - S_t(theta)) / sum_t'(...)
    h(theta') = sum_t omega_t sum_k H_k(theta') / sum_t omega_t T_t          H(theta') = sum_t omega_t sum_k H_k(theta')
    ESS = 1 / sum_t omega_t^2

(self-normalised importance sampling, SNIS). Its exact derivative at theta' = theta is the `split`
estimator of entropy_core.entropy on the same batch: a prediction that disagrees with it as the step
shrinks has a wrong sign or scale. The fixed-prefix change leaves omega uniform: another estimand,
entropy on given tokens.

Log-ratios are differences of float64 sums; forwards belong in float32 (in bfloat16 they are
quantised and the change goes flat as the step shrinks). Below ESS = n/2 a measurement is not to be
trusted.
Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import jackknife_standard_error, sums_over_prompts


@dataclass(frozen=True)
class EntropyMeasurement:
    """Entropy before and after an update (nats per token or per completion), its change and that
    change's standard error.

    effective_sample_size is at most the number of sequences; `trustworthy` says whether it is at
    least half of them.

    Attributes:
        left_out: (B,) the change with each prompt left out, prompts in ascending order of index.

    Examples:
        >>> before = token_statistics(model, batch)
        >>> nothing = snis_entropy_change(before, before, batch)
        >>> nothing.change, nothing.trustworthy
        (0.0, True)
    """

    before: float
    after: float
    change: float
    standard_error: float
    effective_sample_size: float
    sequences: int
    left_out: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def trustworthy(self) -> bool:
        return self.effective_sample_size >= self.sequences / 2


def snis_entropy_change(
    before: TokenStatistics,
    after: TokenStatistics,
    batch: SequenceBatch,
    per_token: bool = True,
    log_weights: Tensor | None = None,
) -> EntropyMeasurement:
    """Change of h (per_token) or H by self-normalised importance sampling.

    Args:
        log_weights: (N,) log-ratio of the policy `before` to the distribution that the batch was
            drawn from; None where that is `before`.

    Raises:
        ValueError: the log-ratios are not finite.

    Examples:
        >>> before, after = token_statistics(model, batch), token_statistics(moved_model, batch)
        >>> measured = snis_entropy_change(before, after, batch)
        >>> abs(measured.after - measured.before - measured.change) < 1e-6, measured.sequences
        (True, 4)
    """
    log_ratio = after.scores() - before.scores()
    if not bool(torch.isfinite(log_ratio).all()):
        bad = int((~torch.isfinite(log_ratio)).nonzero()[0, 0])
        raise ValueError(f"sequence {bad}: its log-probability is not finite before or after the update")
    start = torch.zeros_like(log_ratio) if log_weights is None else log_weights.double()
    # softmax over sequences is self-normalisation, and cannot overflow as exp(log_ratio) could.
    return _measure(before, after, batch, torch.softmax(start, 0), torch.softmax(start + log_ratio, 0), per_token)


def fixed_prefix_entropy_change(
    before: TokenStatistics,
    after: TokenStatistics,
    batch: SequenceBatch,
    per_token: bool = True,
    log_weights: Tensor | None = None,
) -> EntropyMeasurement:
    """Change of mean token entropy on the given tokens under the weights of `before`: the
    fixed-prefix estimand, not the change of h or H.

    Examples:
        >>> before, after = token_statistics(model, batch), token_statistics(moved_model, batch)
        >>> given = fixed_prefix_entropy_change(before, after, batch)
        >>> mean = lambda statistics: (statistics.entropies.sum() / batch.completion_mask.sum()).item()
        >>> abs(given.change - (mean(after) - mean(before))) < 1e-5
        True
    """
    start = torch.zeros(len(batch), dtype=torch.float64, device=batch.device) if log_weights is None else log_weights
    weights = torch.softmax(start.double(), 0)
    return _measure(before, after, batch, weights, weights, per_token)


def _measure(
    before: TokenStatistics,
    after: TokenStatistics,
    batch: SequenceBatch,
    weights_before: Tensor,
    weights: Tensor,
    per_token: bool,
) -> EntropyMeasurement:
    units = batch.completion_lengths.double() if per_token else torch.ones_like(weights)
    columns = torch.stack(  # numerator and denominator of the entropy after, then of the entropy before
        [
            weights * after.entropy_sums(),
            weights * units,
            weights_before * before.entropy_sums(),
            weights_before * units,
        ],
        1,
    )
    by_prompt = sums_over_prompts(columns, batch.prompt_index)
    total = by_prompt.sum(0)
    left_out = total - by_prompt
    changes = left_out[:, 0] / left_out[:, 1] - left_out[:, 2] / left_out[:, 3]
    h_after, h_before = float(total[0] / total[1]), float(total[2] / total[3])
    return EntropyMeasurement(
        before=h_before,
        after=h_after,
        change=h_after - h_before,
        standard_error=jackknife_standard_error(changes),
        effective_sample_size=float(1.0 / weights.square().sum()),
        sequences=len(batch),
        left_out=changes,
    )
