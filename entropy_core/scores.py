"""Token log-probabilities and token entropies of completions.

    log pi(a_k | c_k) = z_{a_k} - logsumexp(z),        H_k = -sum_a pi(a | c_k) log pi(a | c_k),        z = logits / temperature
    d log pi(a_k)/dz = e_{a_k} - pi,                   dH_k/dz = -pi (log pi + H_k)

Symbols: a_k token k of a completion, c_k all that stands before it, z the logits there, e the unit
vector. Units: nats. Source: docs/theory/index.md, "Policy, scores, entropy".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.position_table import check_length
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.passes.state import open_passes


@dataclass(frozen=True)
class TokenStatistics:
    """What the policy thinks of each completion token.

    Attributes:
        logprobs, entropies: (N, L) in the batch's own layout, nats, 0 outside completions; float32
            (float64 from a float64 model).
        surprisal_variances: (N, L) Var[log pi] under the policy, nats^2, where it was asked for.

    Examples:
        >>> statistics = token_statistics(model, batch)
        >>> scores = statistics.logprobs.sum(1)  # S, log-probability of each completion, nats
        >>> bool((scores < 0).all())
        True
    """

    logprobs: Tensor
    entropies: Tensor
    surprisal_variances: Tensor | None = None

    def scores(self) -> Tensor:
        """(N,) float64: S(t) = sum_k log pi(a_k | c_k), nats per completion."""
        return self.logprobs.double().sum(1)

    def entropy_sums(self) -> Tensor:
        """(N,) float64: sum_k H_k, nats per completion."""
        return self.entropies.double().sum(1)

    def select(self, rows: Tensor) -> TokenStatistics:
        """Of the sequences at these (m,) indices, in this order."""
        variances = None if self.surprisal_variances is None else self.surprisal_variances[rows]
        return TokenStatistics(self.logprobs[rows], self.entropies[rows], variances)


def token_statistics(
    model: nn.Module,
    batch: SequenceBatch,
    passes: PassSettings = DEFAULT_PASSES,
    with_variances: bool = False,
    all_digits: bool = False,
) -> TokenStatistics:
    """Log-probabilities and entropies of every completion token, without gradients.

    Runs in length buckets of at most `passes.token_batch_size` padded tokens; the numbers do not
    depend on it beyond rounding.

    Args:
        with_variances: fill in `surprisal_variances` as well.
        all_digits: entropies in float64 where they were found so, for what is made of their
            differences.

    Examples:
        >>> statistics = token_statistics(model, batch)
        >>> statistics.entropies.shape == batch.input_ids.shape
        True
        >>> bool((statistics.entropies <= torch.tensor(8.0).log()).all())  # eight tokens
        True
    """
    check_length(model, int(batch.scored_lengths.max()) - 1)
    places, values = [], []
    with torch.no_grad(), open_passes(model):
        for bucket in length_buckets(batch, passes.token_batch_size):
            found = completion_values(model, bucket, batch.temperature, with_variances=with_variances)
            places.append((bucket.sequences, bucket.columns))
            values.append([v for v in found if v is not None])
    at = (torch.cat([rows for rows, _ in places]), torch.cat([columns for _, columns in places]))
    joined = [torch.cat(parts) for parts in zip(*values, strict=True)]
    if not all_digits:
        joined = [part.to(joined[0].dtype) for part in joined]
    return scatter_statistics(batch, at, *joined)


def scatter_statistics(batch: SequenceBatch, at: tuple[Tensor, Tensor], *values: Tensor) -> TokenStatistics:
    """(m,) values of completion tokens at (row, column) of the batch, in the batch's layout."""
    full = [torch.zeros(batch.input_ids.shape, dtype=v.dtype, device=v.device) for v in values]
    for tensor, found in zip(full, values, strict=True):
        tensor[at] = found
    return TokenStatistics(*full)
