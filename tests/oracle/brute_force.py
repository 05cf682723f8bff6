"""Token terms and gradient rows of any causal model, one unpadded sequence at a time, by plain autograd.

Slow and obvious: no batch, no padding, no mask, no hook. Formulas as in `enumeration`; a model is anything
that maps `input_ids` (1, L) to an object with `logits` (1, L, V).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.oracle.model_cases import TokenLists, parameters_of


def token_terms(
    model: nn.Module, prompt: list[int], completion: list[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """log π(a_k|c_k) and H_k of one completion, both (T,), differentiable."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0] / temperature
    logprobs, entropies = [], []
    for k, token in enumerate(completion):
        sampling_config = torch.softmax(logits[len(prompt) + k - 1], dim=-1)
        logprobs.append(torch.log(sampling_config[token]))
        entropies.append(-(sampling_config * torch.log(sampling_config)).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def statistics(model: nn.Module, lists: TokenLists, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Token terms of every sequence, without gradients."""
    with torch.no_grad():
        return [
            token_terms(model, prompt, completion, temperature)
            for prompt, completion in zip(lists.prompt_ids, lists.completion_ids, strict=True)
        ]


def _gradient(scalar: Tensor, model: nn.Module) -> dict[str, Tensor]:
    parameters = parameters_of(model)
    gradients = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def score_rows(model: nn.Module, lists: TokenLists, temperature: float = 1.0) -> dict[str, Tensor]:
    """∇S of every sequence: name -> (N, *shape)."""
    return _stack(
        [
            _gradient(token_terms(model, prompt, completion, temperature)[0].sum(), model)
            for prompt, completion in zip(lists.prompt_ids, lists.completion_ids, strict=True)
        ]
    )


def entropy_terms(
    model: nn.Module, lists: TokenLists, temperature: float = 1.0, centre: float = 0.0
) -> dict[str, Tensor]:
    """Σ_k ∇H_k + Σ_k G_k ∇log π_k of every sequence, G_k = Σ_{k'≥k} (H_{k'} − centre): name -> (N,
    *shape)."""
    rows = []
    for prompt, completion in zip(lists.prompt_ids, lists.completion_ids, strict=True):
        logprobs, entropies = token_terms(model, prompt, completion, temperature)
        objective = entropies.sum()
        for k in range(len(completion)):
            to_go = sum(float(value) - centre for value in entropies.detach()[k:])
            objective = objective + to_go * logprobs[k]
        rows.append(_gradient(objective, model))
    return _stack(rows)


def token_entropy(model: nn.Module, lists: TokenLists, temperature: float = 1.0) -> float:
    """h of the batch: Σ_t Σ_k H_k / Σ_t T."""
    terms = statistics(model, lists, temperature)
    return float(sum(entropies.sum() for _, entropies in terms) / sum(len(entropies) for _, entropies in terms))
