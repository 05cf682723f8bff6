"""What the test of a watch in several processes runs in each of them: no trainer, so that a process starts quickly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from entropy_core.processes import Processes
from rl_training.config import EntropyProbeConfig
from rl_training.probe.watch import EntropyWatch
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_core.shared_work import VOCABULARY, five_prompts
from tests.rl_training.shared_probe import BATCHES, backward, training_sequences


def watched_steps(rows: list[int], lockstep: bool) -> dict[str, Tensor]:
    """Three watched steps, with trial moves; and how often the model was called without gradients."""
    sharing = Processes.world()
    model, batch = DistanceAttention(VOCABULARY).double(), five_prompts().select(rows)
    calls = torch.zeros(1)
    model.register_forward_pre_hook(lambda *_: calls.add_(0.0 if torch.is_grad_enabled() else 1.0) and None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    watch = EntropyWatch(EntropyProbeConfig(rollouts="current"), model, sharing, lockstep)
    said = []
    for seed in range(3):
        watch.before_step(batch)
        backward(model, optimizer, training_sequences(seed))
        watch.try_parts(optimizer)
        optimizer.step()
        seen = watch.after_step()
        assert seen is not None
        parts = [part.value for part in seen.parts.values()]
        said.append([seen.change.value, seen.cumulative.value, seen.explained, seen.effective_size, *parts])
    return {"said": torch.tensor(said, dtype=torch.float64), "calls": calls}


def watched_under_fully_shard() -> Tensor:
    """Three watched steps of a model whose weights two processes share; in one process, of the same model whole."""
    sharing = Processes.world()
    model, batch = DistanceAttention(VOCABULARY).double(), five_prompts()
    if sharing.size > 1:
        mesh = init_device_mesh("cpu", (sharing.size,))
        for module in (model.query, model.head, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    watch = EntropyWatch(EntropyProbeConfig(rollouts="current"), model, sharing)
    said = []
    for seed in range(3):
        backward(model, optimizer, training_sequences(seed))
        watch.before_step(batch)  # as in a trainer: nothing gives gathered weights back before the optimizer steps
        optimizer.step()
        seen = watch.after_step()
        assert seen is not None
        said.append([seen.entropy, seen.change.value, seen.change.standard_error, seen.explained, seen.effective_size])
    return torch.tensor(said, dtype=torch.float64)


def all_that_is_watched() -> dict[str, dict[str, Tensor]]:
    """Of every batch; in a process group shared, without one alone."""
    kinds = {"shared": False, "lockstep": True}
    return {
        f"{kind}, {name}": watched_steps(list(BATCHES[name]), lockstep)
        for kind, lockstep in kinds.items()
        for name in ("five prompts", "one prompt")
    }
