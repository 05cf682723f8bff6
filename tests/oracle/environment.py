"""Exact entropies of a policy that talks with an environment, by enumerating every trajectory in float64.

After every drawn token but the end token the environment may insert tokens of its own: which ones depends on all that stands
before, and on chance. The policy conditions on them and does not draw them.

    P(t) = Π_k π(a_k∣c_k) · Π_j q(e_j∣prefix)          a_k drawn, e_j inserted; q knows nothing of θ
    H = −E[S],  S = Σ_k log π(a_k∣c_k)                 h = H / E[T],  T the number of drawn tokens

Gradients are flat vectors (D,), in the order of `model.named_parameters()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.oracle.policy import END_TOKEN

Reply = tuple[float, list[int], bool]
"""Its probability, the inserted tokens, and whether the episode ends with them."""
Environment = Callable[[list[int]], list[Reply]]


@dataclass(frozen=True)
class Trajectory:
    """One way that an episode can go. drawn: of each completion token whether the policy drew it. chance: Π q."""

    prompt_index: int
    prompt: list[int]
    completion: list[int]
    drawn: list[bool]
    chance: float


def talkative(prefix: list[int]) -> list[Reply]:
    """Answers token 2 by chance, token 3 by what stands before it, once with the end of the episode, and 1 with silence."""
    if prefix[-1] == 2:
        return [(0.7, [3, 1], False), (0.3, [1], False)]
    if prefix[-1] == 3:
        return [(1.0, [2, 2] if sum(prefix) % 2 else [1, 3, 2], len(prefix) > 3)]
    return [(1.0, [], False)]


def trajectories(
    prompts: list[list[int]], environment: Environment, vocabulary: int, max_drawn: int
) -> list[Trajectory]:
    """Every episode: it ends with the end token, by the environment, or after `max_drawn` drawn tokens (and the reply)."""
    found: list[Trajectory] = []

    def go_on(index: int, prompt: list[int], done: list[int], drawn: list[bool], chance: float) -> None:
        for token in range(vocabulary):
            own, mask = [*done, token], [*drawn, True]
            if token == END_TOKEN:
                found.append(Trajectory(index, prompt, own, mask, chance))
                continue
            for probability, inserted, ends in environment([*prompt, *own]):
                whole, marks = [*own, *inserted], [*mask, *[False] * len(inserted)]
                if ends or sum(marks) == max_drawn:
                    found.append(Trajectory(index, prompt, whole, marks, chance * probability))
                else:
                    go_on(index, prompt, whole, marks, chance * probability)

    for index, prompt in enumerate(prompts):
        go_on(index, prompt, [], [], 1.0)
    return found


def drawn_terms(
    model: nn.Module, prompt: list[int], completion: list[int], drawn: list[bool], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(a_k∣c_k) and H_k of the drawn tokens of one sequence, both (T,), differentiable."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
    logprobs, entropies = [], []
    for k, (token, own) in enumerate(zip(completion, drawn, strict=True)):
        if own:
            sampling_config = torch.softmax(logits[len(prompt) + k - 1], dim=-1)
            logprobs.append(torch.log(sampling_config[token]))
            entropies.append(-(sampling_config * torch.log(sampling_config)).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@dataclass(frozen=True)
class ExactEpisodes:
    """probabilities: (n,) P(t), prompts uniform. entropy, token_entropy, mean_length: H, h, E[T], differentiable."""

    probabilities: Tensor
    entropy: Tensor
    token_entropy: Tensor
    mean_length: Tensor
    expected_token_entropies: Tensor


def solve_episodes(model: nn.Module, episodes: list[Trajectory], temperature: float = 1.0) -> ExactEpisodes:
    """H = −E[S] from the definition; `expected_token_entropies` is E[Σ_k H_k], which must equal it."""
    prompts = len({t.prompt_index for t in episodes})
    scores, sums, lengths = [], [], []
    for t in episodes:
        logprobs, entropies = drawn_terms(model, t.prompt, t.completion, t.drawn, temperature)
        scores.append(logprobs.sum())
        sums.append(entropies.sum())
        lengths.append(float(len(logprobs)))
    score, length = torch.stack(scores), torch.tensor(lengths, dtype=torch.float64)
    chances = torch.tensor([t.chance for t in episodes], dtype=torch.float64)
    probabilities = score.exp() * chances / prompts
    entropy, mean_length = -(probabilities * score).sum(), (probabilities * length).sum()
    return ExactEpisodes(
        probabilities, entropy, entropy / mean_length, mean_length, (probabilities * torch.stack(sums)).sum()
    )
