"""Exact entropies, gradients and kernels of a small policy, by enumerating every completion in float64.

    H = −E[S] = E[Σ_k H_k]                       nats per completion
    h = E[Σ_k H_k] / E[T]                        nats per token
    E[f] = (1/P) Σ_p Σ_t π(t|p) f(t)             P prompts, uniform

    S(t)   score of completion t, the sum of its token log-probabilities at temperature τ
    H_k    entropy of the policy at the prefix of token k
    T      number of tokens, the end token included
    G_k    entropy to go, Σ_{k'≥k} H_{k'} (per token: Σ_{k'≥k} (H_{k'} − h))

Section numbers in the tests are those of the theory document. Gradients are flat vectors (D,), in the order
of `model.named_parameters()`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd

from tests.oracle.policy import Task


@dataclass(frozen=True)
class CompletionSpace:
    """Every completion of every prompt: n rows, at most T tokens each, right-padded with the end token."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    prompt_index: Tensor
    input_ids: Tensor
    predicted_at: Tensor
    tokens: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Completion lengths T (n,) in float64."""
        return self.mask.sum(1)

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return int(self.prompt_index.max()) + 1


def enumerate_completions(task: Task) -> CompletionSpace:
    """Every completion that ends with the end token or is cut at the maximum length, for every prompt of
    `task`."""
    inner = [token for token in range(task.vocabulary) if token != task.end_token]
    completions = []
    for length in range(1, task.max_completion_length + 1):
        ends = [task.end_token] if length < task.max_completion_length else range(task.vocabulary)
        completions += [[*body, end] for body in itertools.product(inner, repeat=length - 1) for end in ends]
    rows = [
        (index, list(prompt), completion) for index, prompt in enumerate(task.prompts) for completion in completions
    ]
    longest = max(len(prompt) + len(completion) for _, prompt, completion in rows)
    cut = task.max_completion_length
    return CompletionSpace(
        prompt_ids=[prompt for _, prompt, _ in rows],
        completion_ids=[completion for _, _, completion in rows],
        prompt_index=torch.tensor([index for index, _, _ in rows]),
        input_ids=torch.tensor([(p + c + [task.end_token] * longest)[:longest] for _, p, c in rows]),
        predicted_at=torch.tensor([[min(len(p) - 1 + k, longest - 1) for k in range(cut)] for _, p, _ in rows]),
        tokens=torch.tensor([(c + [task.end_token] * cut)[:cut] for _, _, c in rows]),
        mask=torch.tensor([[float(k < len(c)) for k in range(cut)] for _, _, c in rows], dtype=torch.float64),
    )


def token_terms(
    model: nn.Module,
    space: CompletionSpace,
    temperature: float = 1.0,
    parameters: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(a_k|c_k) and H_k of every completion, each (n, T) and zero beyond the completion;
    differentiable."""
    values = dict(model.named_parameters()) if parameters is None else parameters
    logits = functional_call(model, values, (space.input_ids,)).logits / temperature
    rows = torch.arange(len(space.tokens))[:, None]
    logits = logits[rows, space.predicted_at]
    log_policy = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    logprobs = log_policy[rows, torch.arange(space.tokens.shape[1])[None, :], space.tokens]
    entropies = -(log_policy.exp() * log_policy).sum(-1)
    return logprobs * space.mask, entropies * space.mask


def exact_entropies(
    model: nn.Module,
    space: CompletionSpace,
    temperature: float = 1.0,
    parameters: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(H, h, E[T]) as differentiable scalars: H = −E[S], the definition, with no token entropy in it."""
    logprobs, _ = token_terms(model, space, temperature, parameters)
    scores = logprobs.sum(1)
    probabilities = scores.exp() / space.prompts
    entropy = -(probabilities * scores).sum()
    length = (probabilities * space.lengths).sum()
    return entropy, entropy / length, length


def flatten(named: dict[str, Tensor]) -> Tensor:
    """One vector (D,) from named tensors, in their order."""
    return torch.cat([tensor.reshape(-1) for tensor in named.values()])


def flatten_rows(named: dict[str, Tensor]) -> Tensor:
    """One matrix (N, D) from named rows (N, *shape), in their order."""
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in named.values()], dim=1)


def unflatten(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors shaped as `like` from a flat vector (D,)."""
    pieces = vector.split([tensor.numel() for tensor in like.values()])
    return {name: piece.reshape(tensor.shape) for (name, tensor), piece in zip(like.items(), pieces, strict=True)}


def detached_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class ExactPolicy:
    """All that the identities need, for one policy at one temperature. n completions, T tokens, D
    parameters."""

    space: CompletionSpace
    probabilities: Tensor  # (n,) π(t|p)/P, sums to one over everything
    logprobs: Tensor  # (n, T)
    entropies: Tensor  # (n, T)
    logprob_gradients: Tensor  # (n, T, D) ∇ log π_k
    entropy_gradients: Tensor  # (n, T, D) ∇H_k
    sequence_entropy: float  # H
    token_entropy: float  # h
    mean_length: float  # E[T]
    sequence_entropy_gradient: Tensor  # (D,) ∇H
    token_entropy_gradient: Tensor  # (D,) ∇h

    @property
    def scores(self) -> Tensor:
        """S (n,)."""
        return self.logprobs.sum(1)

    @property
    def score_rows(self) -> Tensor:
        """∇S (n, D)."""
        return self.logprob_gradients.sum(1)

    def expectation(self, values: Tensor) -> Tensor:
        """E[values] over completions; values (n, ...)."""
        return torch.tensordot(self.probabilities, values, dims=1)

    def entropy_to_go(self, centre: float = 0.0, own_entropy: bool = True) -> Tensor:
        """G_k (n, T): the sum over k' ≥ k of H_{k'} − centre, by plain loops; without H_k if not
        `own_entropy`."""
        n, tokens = self.entropies.shape
        to_go = torch.zeros_like(self.entropies)
        for k in range(tokens):
            for later in range(k, tokens):
                if later > k or own_entropy:
                    to_go[:, k] += self.entropies[:, later] - centre * self.space.mask[:, later]
        return to_go * self.space.mask

    def rao_blackwell_rows(self, centre: float = 0.0, own_entropy: bool = True) -> Tensor:
        """E_t (n, D): Σ_k ∇H_k + Σ_k G_k ∇log π_k of each completion."""
        to_go = self.entropy_to_go(centre, own_entropy)
        return self.entropy_gradients.sum(1) + (to_go[:, :, None] * self.logprob_gradients).sum(1)


def solve(model: nn.Module, space: CompletionSpace, temperature: float = 1.0) -> ExactPolicy:
    """Enumerate `model` over `space`: probabilities, entropies and every gradient, in float64."""
    parameters = detached_parameters(model)
    leaves = {name: value.clone().requires_grad_(True) for name, value in parameters.items()}
    entropy, token_entropy, length = exact_entropies(model, space, temperature, leaves)
    gradient = torch.autograd.grad(entropy, list(leaves.values()), retain_graph=True)
    token_gradient = torch.autograd.grad(token_entropy, list(leaves.values()))
    with torch.no_grad():
        logprobs, entropies = token_terms(model, space, temperature, parameters)
    jacobians = jacfwd(lambda values: token_terms(model, space, temperature, values))(parameters)
    logprob_jacobian, entropy_jacobian = (
        torch.cat([piece.flatten(start_dim=2) for piece in jacobian.values()], dim=2) for jacobian in jacobians
    )
    return ExactPolicy(
        space=space,
        probabilities=logprobs.sum(1).exp() / space.prompts,
        logprobs=logprobs,
        entropies=entropies,
        logprob_gradients=logprob_jacobian.detach(),
        entropy_gradients=entropy_jacobian.detach(),
        sequence_entropy=entropy.item(),
        token_entropy=token_entropy.item(),
        mean_length=length.item(),
        sequence_entropy_gradient=torch.cat([piece.reshape(-1) for piece in gradient]),
        token_entropy_gradient=torch.cat([piece.reshape(-1) for piece in token_gradient]),
    )


def fisher_kernel(eval_rows: Tensor, train_rows: Tensor, preconditioner: Tensor | None = None) -> Tensor:
    """K(t, i) = Σ_d e_td P_d s_id by an explicit loop over pairs; (n_eval, D), (n_train, D), (D,) -> (n_eval,
    n_train)."""
    weights = torch.ones(eval_rows.shape[1], dtype=eval_rows.dtype) if preconditioner is None else preconditioner
    kernel = torch.zeros(len(eval_rows), len(train_rows), dtype=eval_rows.dtype)
    for t, eval_row in enumerate(eval_rows):
        for i, train_row in enumerate(train_rows):
            kernel[t, i] = (eval_row * weights * train_row).sum()
    return kernel


def entropies_along(
    model: nn.Module,
    space: CompletionSpace,
    direction: dict[str, Tensor],
    scale: float,
    temperature: float = 1.0,
) -> tuple[float, float]:
    """(H, h) of the policy at θ + scale·direction, exactly; the model is left as it is."""
    moved = {name: value + scale * direction[name] for name, value in detached_parameters(model).items()}
    with torch.no_grad():
        entropy, token_entropy, _ = exact_entropies(model, space, temperature, moved)
    return float(entropy), float(token_entropy)
