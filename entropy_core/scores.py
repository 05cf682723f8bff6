"""Token log-probabilities and token entropies of completions.

    log pi(a_k | c_k) = z_{a_k} - logsumexp(z),        H_k = -sum_a pi(a | c_k) log pi(a | c_k),        z = logits / temperature
    d log pi(a_k)/dz = e_{a_k} - pi,                   dH_k/dz = -pi (log pi + H_k)

Symbols: a_k token k of a completion, c_k all that stands before it, z the logits there, e the unit vector.
Units: nats. Source: docs/theory/index.md, "Policy, scores, entropy".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import DEFAULT_TOKEN_BATCH_SIZE, SequenceBatch, length_buckets
from entropy_core.forward import completion_logits, evaluation_mode

# Rows of logits that are turned into probabilities at a time: bounds the temporaries, changes no number.
_CHUNK_ELEMENTS = 2**24


class _LogprobAndEntropy(torch.autograd.Function):
    """(logits (m, V), targets (m,)) -> log-probabilities (m,), entropies (m,); keeps nothing of size V but the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001 - autograd's own type
        log_normalizer = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
        entropies = torch.empty_like(log_normalizer)
        for part in _chunks(logits):
            log_normalizer[part] = torch.logsumexp(logits[part], 1)
            logprobs = _bounded_logprobs(logits[part], log_normalizer[part])
            entropies[part] = -(logprobs.exp() * logprobs).sum(1)
        chosen = logits.gather(1, targets[:, None]).squeeze(1) - log_normalizer
        ctx.save_for_backward(logits, targets, log_normalizer, entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        logits, targets, log_normalizer, entropies = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in _chunks(logits):
            logprobs = _bounded_logprobs(logits[part], log_normalizer[part])
            inner = (logprobs + entropies[part, None]).mul_(grad_entropy[part, None]).add_(grad_logprob[part, None])
            torch.mul(logprobs.exp_(), inner, out=grad[part])
        grad.neg_()
        grad.scatter_add_(1, targets[:, None], grad_logprob[:, None])
        return grad, None


def _bounded_logprobs(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    # 0 * -inf is NaN where a token is ruled out; its limit, and that token's share of every sum, is 0. At -1e4 the
    # probability is 0 in every precision already, and no weight of a user's overflows.
    return (logits - log_normalizer[:, None]).clamp_(min=-1e4)


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def logprobs_and_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies of the whole distribution, both (m,) nats, differentiable once.

    logits: (m, V), already divided by the temperature; targets: (m,) int64.
    """
    return _LogprobAndEntropy.apply(logits, targets)


@dataclass(frozen=True)
class TokenStatistics:
    """What the policy thinks of each completion token.

    logprobs, entropies: (N, L) in the batch's own layout, nats, 0 outside completions; float32 (float64 from a float64
    model). surprisal_variances: (N, L) Var[log pi] under the policy, nats^2, where it was asked for.
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


def token_statistics(
    model: nn.Module,
    batch: SequenceBatch,
    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE,
    with_variances: bool = False,
) -> TokenStatistics:
    """Log-probabilities and entropies of every completion token, without gradients.

    Runs in length buckets of at most `token_batch_size` padded tokens; the numbers do not depend on it beyond rounding.
    with_variances: fill in `surprisal_variances` as well.
    """
    places, values = [], []
    with torch.no_grad(), evaluation_mode(model):
        for bucket in length_buckets(batch, token_batch_size):
            logits = completion_logits(model, bucket, batch.temperature)
            found = list(logprobs_and_entropies(logits, bucket.targets))
            if with_variances:
                found.append(_surprisal_variances(logits, found[1]))
            places.append((bucket.sequences, bucket.columns))
            values.append(found)
    at = (torch.cat([rows for rows, _ in places]), torch.cat([columns for _, columns in places]))
    return scatter_statistics(batch, at, *(torch.cat(parts) for parts in zip(*values, strict=True)))


def _surprisal_variances(logits: Tensor, entropies: Tensor) -> Tensor:
    """(m,) Var[log pi] = sum_a pi (log pi + H)^2 under each row's distribution."""
    out = torch.empty_like(entropies)
    for part in _chunks(logits):
        logprobs = _bounded_logprobs(logits[part], torch.logsumexp(logits[part], 1))
        out[part] = (logprobs.exp() * (logprobs + entropies[part, None]).square()).sum(1)
    return out


def scatter_statistics(batch: SequenceBatch, at: tuple[Tensor, Tensor], *values: Tensor) -> TokenStatistics:
    """(m,) values of completion tokens at (row, column) of the batch, in the batch's layout."""
    full = [torch.zeros(batch.input_ids.shape, dtype=v.dtype, device=v.device) for v in values]
    for tensor, found in zip(full, values, strict=True):
        tensor[at] = found
    return TokenStatistics(*full)
