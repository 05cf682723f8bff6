"""A training loop written by hand on FSDP2, as in verl or torchtitan, with the probe's `watch` in it: forward passes alone.

    torchrun --nproc-per-node 2 examples/fsdp2_loop_with_watch.py smollm2-135m

Each process holds a part of every weight and trains on its part of the sequences; all watch the whole batch together.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from entropy_core import SequenceBatch
from entropy_core.processes import Processes
from rl_training.config import EntropyProbeConfig
from rl_training.models import load_model_and_tokenizer
from rl_training.probe.watch import EntropyWatch, WatchedChange
from rl_training.sampling import draw, make_sampling_config


def loss_of(model: torch.nn.Module, batch: SequenceBatch, advantages: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return -(advantages[:, None] * logprobs * batch.completion_mask[:, 1:]).sum() / len(batch)


def shard(model: torch.nn.Module) -> None:
    """A group of weights a layer, and one for the rest."""
    mesh = init_device_mesh("cpu" if not torch.cuda.is_available() else "cuda", (dist.get_world_size(),))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Watched:
    """The adapter. `batch` is what the policy has just drawn, before anything is filtered: the same in every process."""

    def __init__(self, model: torch.nn.Module, config: EntropyProbeConfig) -> None:
        self.model, sharded = model, isinstance(model, FSDPModule)
        # lockstep: a pass of one process is a gathering of weights in all, so that all must make equally many
        self.watch = EntropyWatch(config, model, Processes.world(), lockstep=sharded)

    def before_step(self, batch: SequenceBatch) -> None:
        self.watch.before_step(batch)

    def after_step(self) -> WatchedChange:
        change = self.watch.after_step()
        assert change is not None
        return change


def train(model_name: str, steps: int = 3, learning_rate: float = 1e-5) -> list[WatchedChange]:
    """The changes of entropy that were watched. Without a process group: the same loop on the whole model."""
    model, tokenizer = load_model_and_tokenizer(model_name)
    model.requires_grad_(True)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if size > 1:
        shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    watched = Watched(model, EntropyProbeConfig())
    sampling_config = make_sampling_config(model, tokenizer, temperature=1.0, max_completion_length=8)
    rows = [{"prompt": f"{a} + {b} =", "prompt_index": 6 * a + b} for a in range(6) for b in range(6)]
    changes = []
    for step in range(steps):
        # A stand-in for the generation engine: every process draws the same sequences.
        rollouts = draw(model, tokenizer, rows[step % 6 :: 6], 4, sampling_config, seed=step, status="training")
        batch = rollouts.to_batch(sampling_config)
        rewards = torch.tensor([float("7" in text) for text in rollouts.completion])
        advantages = rewards - rewards.mean() + 0.1 * torch.linspace(-1, 1, len(rewards))
        mine = torch.arange(rank, len(batch), size)
        optimizer.zero_grad()
        loss_of(model, batch.select(mine), advantages[mine]).backward()  # FSDP averages over processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        watched.before_step(batch)
        optimizer.step()
        changes.append(watched.after_step())
        if rank == 0:
            seen = changes[-1].change
            print(
                f"step {step + 1}: entropy {changes[-1].entropy:.4f}, changed by {seen.value:+.5f} ± {seen.standard_error:.5f} "
                "nats per token"
            )
    return changes


def main(model_name: str = "smollm2-135m", steps: int = 3) -> None:
    launched = dist.is_torchelastic_launched()
    if launched:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(model_name, steps)
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
