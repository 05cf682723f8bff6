"""What the tests of several processes run in each of them: no trainer, so that a process starts quickly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.processes import Processes
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.probe.metrics import metrics_of
from rl_training.probe.shares import TrainingSequences
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_core.shared_work import VOCABULARY, five_prompts

CONFIGS = {
    "default": {},
    "everything": {
        "estimator": "rao_blackwell",
        "mode": "attribution",
        "predictors": True,
        "per_completion": True,
        "rollouts": "fresh",
    },
    "plain gradients": {"standard_error_folds": 0, "preconditioning": "none", "averaging": 0.0},
}
# All five prompts; and two, of which the second process gets one; and one, of which it gets none.
BATCHES = {"five prompts": range(8), "two prompts": range(3), "one prompt": [0, 1]}


def training_sequences(seed: int) -> TrainingSequences:
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TrainingSequences(five_prompts(), advantages, advantages / 20)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, training: TrainingSequences) -> None:
    """The gradient of -sum_i w_i S_i over right-padded sequences, every process the whole of it."""
    batch, weights = training.batch, training.weights
    assert weights is not None
    optimizer.zero_grad()
    logprobs = (model(batch.input_ids).logits[:, :-1] / batch.temperature).log_softmax(-1)
    chosen = logprobs.gather(2, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]
    (-(weights * chosen.sum(1)).sum()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def watched_steps(config: dict, batch: SequenceBatch, sharing: Processes) -> list[dict[str, Tensor]]:
    """Everything that the probe says of three steps on one fixed batch and fixed losses."""
    model = DistanceAttention(VOCABULARY).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    probe = SimpleEntropyProbe(EntropyProbeConfig(**{"mode": "simple", "preset": "accurate", **config}), model, sharing)
    out: list[dict[str, Tensor]] = []
    drawn = probe.statistics(batch).scores()
    for seed in range(3):
        probe.observe(batch, drawn, prior_log_weights=-0.1 * batch.prompt_index.double())
        training = training_sequences(seed)
        backward(model, optimizer, training)
        probe.before_step(optimizer, training)
        optimizer.step()
        change = probe.after_step()
        assert change is not None
        said = {name: torch.tensor([value], dtype=torch.float64) for name, value in metrics_of(change).items()}
        if change.shares is not None:
            said["shares"] = change.shares
        out.append(said)
    return out


def all_that_the_probe_says() -> dict[str, list[dict[str, Tensor]]]:
    """Of every configuration and batch; in a process group shared, without one alone."""
    sharing = Processes.world()
    return {
        f"{config}, {batch}": watched_steps(CONFIGS[config], five_prompts().select(list(BATCHES[batch])), sharing)
        for config in CONFIGS
        for batch in BATCHES
    }
