"""`analyze --dry-run --devices N`: the plan of an analysis on any cluster, on paper; nothing is loaded and nothing is timed.

Each device is a process of its own that holds the whole model, as under `accelerate launch`: rows of the training side are formed
once and exchanged (memory), stored and read (disk), or formed anew by all (tiles); evaluation blocks are dealt out. A model that
is larger than a device takes several of them through a device map, which compute one after another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.folder import resolve_checkpoint
from entropy_experiments.checkpoints.validation import examine_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.forecast.pass_costs import PassCosts, count_passes
from entropy_experiments.kernel.contraction import ROW_KINDS
from entropy_experiments.kernel.modules import chosen_parameters
from entropy_experiments.kernel.options import LOGIT_BYTES
from entropy_experiments.kernel.plan import KernelPlan, KernelSize, fixed_bytes, plan_kernel
from rl_training.errors import UserError

DEVICE_MEMORY = 80 << 30
"""Bytes of a device where `fisher_kernel.memory_budget` names none."""
OPERATIONS = 50e12
"""Floating-point operations a second of a device in float32: three quarters of an H100's data sheet."""
PROMPT, COMPLETION = 256, 512
"""Tokens, where nothing says them."""


@dataclass(frozen=True)
class ClusterPlan:
    """costs: of one sequence. group: devices that hold one model. workers: groups. seconds: by what they go to.

    memory: bytes of a worker; left: of these for rows. kernel: how rows are kept.
    """

    costs: PassCosts
    kernel: KernelPlan
    n_eval: int
    n_train: int
    devices: int
    bandwidth: float
    group: int
    memory: int
    left: int
    seconds: dict[str, float]

    @property
    def workers(self) -> int:
        return self.devices // self.group

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def to_json(self) -> dict[str, Any]:
        return {
            "costs": self.costs.__dict__,
            "plan": self.kernel.to_json(),
            "devices": self.devices,
            "devices_a_model": self.group,
            "memory_bytes": self.memory,
            "seconds": self.seconds,
            "limit": self.limit,
        }

    def lines(self) -> list[str]:
        """To print."""
        c = self.costs
        gathered = 2 * c.weight_bytes * (self.devices - 1) / self.devices / self.bandwidth
        computed = (c.forward + len(ROW_KINDS) * c.backward) / OPERATIONS
        out = [
            f"on paper: {self.n_eval:,} evaluation x {self.n_train:,} training sequences of {c.tokens} tokens, "
            f"{self.devices} devices of {self.memory / self.group / 2**30:.0f} GiB, {OPERATIONS:.3g} operations and "
            f"{self.bandwidth:.3g} bytes a second each",
            f"one sequence: forward {c.forward:.3g} operations, backward {c.backward:.3g} a kind of row; graph "
            f"{c.graph_bytes / 2**30:.2f} GiB",
            f"rows of {c.parameters:,} parameters: {c.row_bytes / 2**20:.0f} MiB each, "
            f"{self.n_train * c.row_bytes / 1e12:.3g} TB for the training side",
            f"model {c.weight_bytes / 2**30:.0f} GiB on {self.group} device{'s' * (self.group > 1)}: {self.workers} at work, "
            f"{self.left / 2**30:.1f} GiB left for rows in each",
            f"strategy {self.kernel.strategy}: {math.ceil(self.n_train / self.kernel.tile)} tiles of {self.kernel.tile:,} "
            f"training rows, {self.kernel.passes:.3g} passes for the evaluation side, {self.kernel.disk / 1e12:.3g} TB on disk",
        ]
        out += [f"  {name:<44} {_duration(value):>12}" for name, value in self.seconds.items()]
        out.append(f"limited by {self.limit}, {_duration(sum(self.seconds.values()))} in all")
        out.append(
            f"cut over all devices by FSDP instead (not in this release), one pass of one sequence would gather weights for "
            f"{_duration(gathered)} and compute for {_duration(computed / self.devices)}"
        )
        return out


def plan_cluster(
    checkpoint: str | Path, config: FisherAnalysisConfig, devices: int, bandwidth: float, local_files_only: bool = False
) -> ClusterPlan:
    """The plan for a checkpoint, from its configuration files alone.

    Args:
        checkpoint: Its folder, or a run's.
        config: Sizes of both sides, modules, budgets (`memory_budget` is a device's memory), completion length.
        devices: How many there are.
        bandwidth: Bytes a second that a device exchanges with others, or reads from disk.
        local_files_only: Nothing is fetched.

    Raises:
        UserError: A checkpoint that cannot be examined, a model larger than all devices together, or room for not one row.
    """
    found = examine_checkpoint(
        resolve_checkpoint(checkpoint), model_name=config.checkpoint.model, local_files_only=local_files_only
    )
    if found.outline is None:
        raise UserError(
            f"the model of {checkpoint} cannot be examined: " + "; ".join([*found.problems, *found.notes])[:200]
        )
    recorded = None if found.sidecar is None else found.sidecar.sampling.max_completion_length
    completion = config.entropy_analysis.sampling.max_completion_length or recorded or COMPLETION
    return plan_model(found.outline, config, devices, bandwidth, PROMPT, completion)


def plan_model(
    model: Any, config: FisherAnalysisConfig, devices: int, bandwidth: float, prompt: int, completion: int
) -> ClusterPlan:
    """The plan for a model on the meta device; see `plan_cluster`."""
    settings = config.entropy_analysis
    kernel = settings.fisher_kernel
    n_eval, n_train = settings.eval_batch_size, settings.train_batch_size
    costs = count_passes(model, prompt, completion, set(chosen_parameters(model, kernel.filter_modules)))
    size = KernelSize(n_eval, n_train, costs.parameters, len(ROW_KINDS), kernel.gradient_dtype, costs.largest)
    each = int(kernel.memory_budget or DEVICE_MEMORY)
    one_pass = max(1, kernel.token_batch_size // costs.tokens) * costs.graph_bytes + LOGIT_BYTES
    needed = costs.weight_bytes + one_pass + fixed_bytes(size) + 4 * size.row_bytes
    group = next((k for k in range(1, devices + 1) if k * each >= needed), None)
    if group is None:
        raise UserError(
            f"one model with a pass and a row a side takes {needed / 2**30:.0f} GiB, and {devices} devices have "
            f"{devices * each / 2**30:.0f} GiB together: more devices, or fewer parameters (filter_modules)"
        )
    memory = group * each - costs.weight_bytes - one_pass
    plan = plan_kernel(size, memory, int(kernel.disk_budget), strategy=_wanted(kernel.strategy))
    workers = devices // group
    seconds = _seconds(costs, plan, size, workers, bandwidth, kernel.compute_full)
    left = memory - fixed_bytes(size)
    return ClusterPlan(costs, plan, n_eval, n_train, devices, bandwidth, group, group * each, left, seconds)


def _wanted(strategy: str) -> Any:
    return None if strategy == "auto" else strategy


def _seconds(
    costs: PassCosts, plan: KernelPlan, size: KernelSize, workers: int, bandwidth: float, full: bool
) -> dict[str, float]:
    """By what they go to. Tiles are formed by every worker, for blocks of one tile are dealt out to all."""
    tiles = math.ceil(size.n_train / plan.tile) if plan.strategy == "tiles" else 1
    row = costs.forward + costs.backward
    several = costs.forward + len(ROW_KINDS) * costs.backward
    forming = size.n_train * row / (1 if plan.strategy == "tiles" else workers)
    rows = size.n_eval + (size.n_train if full else 0)  # those that stream past the training rows
    entries = rows * size.n_train * len(ROW_KINDS) if full else 0
    passes = (tiles if full else 1) * rows * several
    moved = size.n_train * size.row_bytes if plan.strategy == "memory" and workers > 1 else 0
    read = 0
    if plan.strategy == "disk":
        read = math.ceil(rows / plan.chunk) * size.n_train * size.stored_row_bytes
    return {
        "forming training rows": forming / OPERATIONS,
        "passes of the sides that stream past them": passes / workers / OPERATIONS,
        "products of rows": 2 * entries * costs.parameters / workers / OPERATIONS,
        "exchanging and reading rows": (moved + read / workers) / bandwidth,
    }


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"
