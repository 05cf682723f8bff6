"""Log-probabilities and entropies from logits, with their derivatives, and nothing of the vocabulary's size but the logits.

    log pi(a) = z_a - logsumexp(z),   H = -sum_a pi(a) log pi(a),   d log pi(a)/dz = e_a - pi,   dH/dz = -pi (log pi + H)

Symbols: z logits over the temperature, e_a the unit vector. Units: nats. Source: docs/theory/index.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of logits that are turned into probabilities at a time: bounds the temporaries, changes no number.
_CHUNK_ELEMENTS = 2**24
# 0 * -inf is NaN where a token is ruled out; its limit, and that token's share of every sum, is 0. Here the probability is 0
# in every precision already, and no weight of a user's overflows.
LEAST_LOGPROB = -1e4
_STRETCH = 256  # tokens


class _LogprobAndEntropy(torch.autograd.Function):
    """(logits (m, V), targets (m,)) -> log-probabilities (m,), entropies (m,); keeps nothing of size V but the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001 - autograd's own type
        log_normalizer = torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device)
        entropies = torch.empty_like(log_normalizer)
        for part in logit_chunks(logits):
            log_normalizer[part] = torch.logsumexp(logits[part], 1)
            logprobs = bounded_logprobs(logits[part], log_normalizer[part])
            entropies[part] = -(logprobs.exp() * logprobs).sum(1)
        chosen = logits.gather(1, targets[:, None]).squeeze(1) - log_normalizer
        ctx.save_for_backward(logits, targets, log_normalizer, entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        logits, targets, log_normalizer, entropies = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in logit_chunks(logits):
            logprobs = bounded_logprobs(logits[part], log_normalizer[part])
            inner = (logprobs + entropies[part, None]).mul_(grad_entropy[part, None]).add_(grad_logprob[part, None])
            torch.mul(logprobs.exp_(), inner, out=grad[part])
        grad.neg_()
        grad.scatter_add_(1, targets[:, None], grad_logprob[:, None])
        return grad, None


def bounded_logprobs(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """(m, V) log-probabilities, at least LEAST_LOGPROB."""
    return (logits - log_normalizer[:, None]).clamp_(min=LEAST_LOGPROB)


def logit_chunks(logits: Tensor) -> list[slice]:
    """Slices of the rows of (m, V) logits, small enough for temporaries."""
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def logprobs_and_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` and entropies of the whole distribution, both (m,) nats, differentiable once.

    logits: (m, V), already divided by the temperature; targets: (m,) int64.
    """
    return _LogprobAndEntropy.apply(logits, targets)


def surprisal_variances(logits: Tensor, entropies: Tensor) -> Tensor:
    """(m,) Var[log pi] = sum_a pi (log pi + H)^2 under each row's distribution."""
    out = torch.empty_like(entropies)
    for part in logit_chunks(logits):
        logprobs = bounded_logprobs(logits[part], torch.logsumexp(logits[part], 1))
        out[part] = mean_square(logprobs.exp(), logprobs + entropies[part, None])
    return out


def mean_square(p: Tensor, values: Tensor) -> Tensor:
    """(m,) sum_a p_a values_a^2 of (m, V)."""
    return torch.linalg.vecdot(p, values.square())


def precise_dot(left: Tensor, right: Tensor) -> Tensor:
    """(m,) float64: sum_a left_a right_a of (m, V), each stretch of tokens summed in their own precision.

    Entropies of a policy near the uniform one are large and differ little; in float32 alone their differences, which K_H is
    made of, would lose four digits. As fast as a sum in float32, six times faster than one in float64.
    """
    whole = left.shape[1] - left.shape[1] % _STRETCH
    stretches = (tensor[:, :whole].unflatten(1, (-1, _STRETCH)) for tensor in (left, right))
    rest = torch.linalg.vecdot(left[:, whole:], right[:, whole:]).double()
    return torch.linalg.vecdot(*stretches).sum(1, dtype=torch.float64) + rest


def precise_sum(values: Tensor) -> Tensor:
    """(m,) float64: sum_a values_a of (m, V), as in `precise_dot`."""
    whole = values.shape[1] - values.shape[1] % _STRETCH
    stretches = values[:, :whole].unflatten(1, (-1, _STRETCH)).sum(2)
    return stretches.sum(1, dtype=torch.float64) + values[:, whole:].sum(1).double()
