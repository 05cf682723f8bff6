"""The estimators of the entropy gradient against the gradient itself, for a policy small enough to enumerate.

    h = sum_t pi(t) sum_k H_k / sum_t pi(t) T_t,     D h along a direction u by differentiating that very sum
    estimators: the mean of <E_t, u> over every completion t, weighted by pi(t); without sampling, so without noise

A run's own sequences cannot decide this: a test of the estimators' difference on 2,000 sequences of an exact world would let 54%
of the prediction through. What is checked are the coefficients as they are installed here, on the device of the analysis.
Source: docs/theory/entropy-gradient.md.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator, entropy_coefficients
from entropy_core.scores import TokenStatistics
from entropy_experiments.run.self_checks import SelfCheck

_VOCABULARY, _LONGEST, _TOLERANCE = 3, 3, 1e-9
_ESTIMATORS: tuple[Estimator, ...] = ("rao_blackwell", "split", "score_function")


def check_estimators(device: torch.device) -> SelfCheck:
    """Of D h and D H, the largest error of an estimator's expectation, relative to the derivative; float64."""
    completions = _completions()
    prefixes = sorted({tuple(c[:k]) for c in completions for k in range(len(c))})
    batch = SequenceBatch.from_sequences([[0]] * len(completions), completions, [0] * len(completions), 0).to(device)
    generator = torch.Generator().manual_seed(0)
    logits, along = torch.randn(2, len(prefixes), _VOCABULARY, generator=generator, dtype=torch.float64)
    rows = torch.tensor(
        [[prefixes.index(tuple(c[:k])) if k < len(c) else 0 for k in range(_LONGEST)] for c in completions]
    )
    tokens = torch.tensor([(c + [0] * _LONGEST)[:_LONGEST] for c in completions])
    mask = torch.tensor([[float(k < len(c)) for k in range(_LONGEST)] for c in completions], dtype=torch.float64)

    log_policy = logits.requires_grad_().log_softmax(1)
    policy = log_policy.exp()
    logprobs, entropies = log_policy[rows, tokens] * mask, -(policy * log_policy).sum(1)[rows] * mask
    scores, place = logprobs.sum(1), batch.completion_mask.nonzero(as_tuple=True)
    entropy = -(scores.exp() * scores).sum()
    exact = [entropy / (scores.exp() * mask.sum(1)).sum(), entropy]
    derivatives = [float((torch.autograd.grad(x, logits, retain_graph=True)[0] * along).sum()) for x in exact]

    def as_drawn(values: Tensor) -> Tensor:
        out = torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=device)
        out[place] = values.detach()[mask.bool()].to(device)
        return out

    moved = along - (policy * along).sum(1, keepdim=True)  # D log pi
    own = as_drawn(moved[rows, tokens]), as_drawn(-(policy * moved * log_policy).sum(1)[rows])  # and D H_k
    weights = (scores.detach().exp() * len(batch)).to(device)
    statistics = TokenStatistics(as_drawn(logprobs), as_drawn(entropies))
    worst = 0.0
    for estimator in _ESTIMATORS:
        for per_token, derivative in zip((True, False), derivatives, strict=True):
            c = entropy_coefficients(statistics, batch, estimator, per_token, weights)
            found = float((c.logprob * own[0] + c.entropy * own[1]).sum()) / len(batch)
            if estimator == "score_function":  # its baseline leaves the completion itself out
                found *= 1 - 1 / len(batch)
            worst = max(worst, abs(found / derivative - 1))
    return SelfCheck(
        "estimators = gradient, enumerated", worst, _TOLERANCE,
        "expectation of Rao-Blackwell, split and score function over every completion of a small policy against the derivative "
        "of its enumerated entropy, in float64. Fails where this installation computes an estimator's coefficients wrongly.",
    )  # fmt: skip


def _completions() -> list[list[int]]:
    """All that end with token 0, or have `_LONGEST` tokens."""
    inner, found = range(1, _VOCABULARY), []
    for length in range(1, _LONGEST + 1):
        ends = [0] if length < _LONGEST else range(_VOCABULARY)
        found += [[*body, end] for body in itertools.product(inner, repeat=length - 1) for end in ends]
    return found
