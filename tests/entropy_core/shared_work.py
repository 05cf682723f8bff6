"""What the tests of several processes run in each of them: torch only, so that a process starts quickly."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.entropy import ESTIMATORS, TokenCoefficients, entropy_coefficients
from entropy_core.fold_gradients import Objectives, fold_gradients, shared_statistics
from entropy_core.gradients import dot, trainable_parameters
from entropy_core.passes.shared_prefix import shared_prefix_buckets
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from tests.entropy_core.attention_policy import DistanceAttention

VOCABULARY = 11
OBJECTIVES = [(estimator, per_token) for estimator in ESTIMATORS for per_token in (True, False)]
# Sequences of five prompts, of two, of two with one completion each, and of one: then the second process has no work.
CHOSEN = [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2], [3, 5], [0, 1]]
LAYOUTS = {
    "length buckets": length_buckets,
    "shared prefixes": shared_prefix_buckets,
    "several buckets": partial(shared_prefix_buckets, token_batch_size=9),
}


def objectives_of(batch: SequenceBatch, weights: Tensor | None = None, wanted=OBJECTIVES) -> Objectives:
    """What fold_gradients asks for: coefficients of every estimator in both units."""

    def objectives(statistics: TokenStatistics) -> list[TokenCoefficients]:
        return [entropy_coefficients(statistics, batch, e, per_token, weights) for e, per_token in wanted]

    return objectives


def random_direction(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in trainable_parameters(model).items()
    }


def five_prompts() -> SequenceBatch:
    """Prompts of one to five tokens with one to three completions of one to six."""
    generator = torch.Generator().manual_seed(4)

    def draw(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    prompts = [draw(length) for length in (3, 1, 5, 2, 4)]
    index = [0, 0, 1, 2, 0, 3, 4, 2]
    completions = [draw(length) for length in (4, 2, 6, 1, 3, 5, 4, 2)]
    return SequenceBatch.from_sequences([prompts[p] for p in index], completions, index, 0, 0.9)


def world() -> Processes:
    """All processes, or this one where there is no group."""
    return Processes.world()


def numbers_of_every_setting() -> dict[str, list[float]]:
    """Along a direction and predicted by every estimator, and the token statistics, for several batches and layouts."""
    sharing = world()
    model = DistanceAttention(VOCABULARY).double()
    direction = random_direction(model)
    out: dict[str, list[float]] = {}
    for chosen in CHOSEN:
        batch = five_prompts().select(chosen)
        objectives = objectives_of(batch)
        for layout, buckets in LAYOUTS.items():
            for folds in (1, 4):
                found, statistics = fold_gradients(model, batch, objectives, buckets, folds, sharing)
                values = [v for g in found for v in (*g.along(direction).tolist(), g.predict(direction).value)]
                values += [dot(g.total(), direction) for g in found]
                values += statistics.logprobs.flatten().tolist() + statistics.entropies.flatten().tolist()
                again = shared_statistics(model, batch, buckets, sharing)
                values += again.scores().tolist() + again.entropy_sums().tolist()
                out[f"sequences {chosen}, {layout}, {folds} folds"] = values
    prompts, kept = torch.tensor([4, 4, 9, 1, 9, 30]), torch.tensor([1.0, 2.0])
    out["mine"] = sharing.my_sequences(prompts).tolist()
    out["any"] = [float(sharing.any(c, prompts.device)) for c in (False, sharing.rank == sharing.size - 1)]
    out["sum"] = sharing.sum(kept).tolist()
    out["summed tensor afterwards"] = kept.tolist()
    return out
