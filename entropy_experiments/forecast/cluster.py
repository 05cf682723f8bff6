"""`analyze --dry-run --devices N`: the plan of an analysis on any cluster, on paper; nothing is loaded and nothing is timed.

With `checkpoint.sharding` the model is cut over all devices, which pass every sequence together. Without, each device is a
process of its own that holds the whole model, as under `accelerate launch`: rows of the training side are formed once and
exchanged (memory), stored and read (disk), or formed anew by all (tiles); evaluation blocks are dealt out. A model that is larger
than a device takes several of them through a device map, which compute one after another.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.folder import resolve_checkpoint
from entropy_experiments.checkpoints.validation import examine_checkpoint
from entropy_experiments.config import FisherAnalysisConfig, FisherKernelConfig
from entropy_experiments.cut_checkpoint import layers_gathered_alone
from entropy_experiments.forecast.cluster_plan import OPERATIONS, ClusterPlan
from entropy_experiments.forecast.pass_costs import PassCosts, count_passes, short_pass
from entropy_experiments.kernel.contraction import ROW_KINDS, STEP_VECTORS
from entropy_experiments.kernel.factor_sizes import Lengths, factor_sizes
from entropy_experiments.kernel.modules import chosen_parameters
from entropy_experiments.kernel.options import LOGIT_BYTES
from entropy_experiments.kernel.plan import (
    HELD_LATER,
    KernelPlan,
    KernelSize,
    Strategy,
    fixed_bytes,
    plan_directions,
    plan_kernel,
)
from rl_training.errors import UserError

DEVICE_MEMORY = 80 << 30
"""Bytes of a device where `fisher_kernel.memory_budget` names none."""
PROMPT, COMPLETION = 256, 512
"""Tokens, where nothing says them."""


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
    if config.checkpoint.sharding is not None:
        return _plan_cut_model(model, config, devices, bandwidth, prompt, completion)
    settings = config.entropy_analysis
    kernel = settings.fisher_kernel
    n_eval, n_train = settings.eval_batch_size, settings.train_batch_size
    names = set(chosen_parameters(model, kernel.filter_modules))
    costs = count_passes(model, prompt, completion, names)
    together = max(1, kernel.token_batch_size // costs.tokens)
    lengths = Lengths(costs.tokens, completion, costs.tokens, completion, together * costs.tokens)
    factors = factor_sizes(model, names, lengths, short_pass(model))
    shape = (n_eval, n_train, costs.parameters, len(ROW_KINDS), kernel.gradient_dtype, costs.largest)
    size = KernelSize(*shape, factors)
    each, taken = (
        int(kernel.memory_budget or DEVICE_MEMORY),
        costs.weight_bytes + together * costs.graph_bytes + LOGIT_BYTES,
    )
    group, plan = _smallest_group(size, kernel, each, taken, devices)
    memory = group * each - taken
    workers = devices // group
    seconds = _seconds(costs, plan, size, workers, bandwidth, kernel.compute_full)
    later = HELD_LATER * size.row_bytes if plan.strategy == "factored" and plan.disk else 0
    left = memory - fixed_bytes(size, plan.strategy) + later
    return ClusterPlan(costs, plan, n_eval, n_train, devices, bandwidth, group, group * each, left, seconds)


def _smallest_group(
    size: KernelSize, kernel: FisherKernelConfig, each: int, taken: int, devices: int
) -> tuple[int, KernelPlan]:
    """As few devices as hold one model with `taken` bytes of weights and a pass, and a plan that fits beside them."""
    for group in range(max(1, -(-taken // each)), devices + 1):
        memory = group * each - taken
        try:
            if not kernel.compute_full:
                return group, plan_directions(size, memory)
            return group, plan_kernel(size, memory, int(kernel.disk_budget), strategy=_wanted(kernel.strategy))
        except UserError:
            continue
    strategy: Strategy = "factored" if kernel.compute_full else "directions"
    needed = taken + fixed_bytes(size, strategy)
    raise UserError(
        f"one model with a pass and what is held beside it takes {needed / 2**30:.0f} GiB and more, and {devices} devices have "
        f"{devices * each / 2**30:.0f} GiB together: more devices, or fewer parameters (filter_modules)"
    )


def _wanted(strategy: str) -> Any:
    return None if strategy == "auto" else strategy


def _seconds(
    costs: PassCosts, plan: KernelPlan, size: KernelSize, workers: int, bandwidth: float, full: bool
) -> dict[str, float]:
    """By what they go to. Tiles are formed by every worker, for blocks of one tile are dealt out to all."""
    tiles = math.ceil(size.n_train / plan.tile) if plan.strategy == "tiles" else 1
    row = costs.forward + costs.backward
    several = costs.forward + (len(ROW_KINDS) if full else 2) * costs.backward
    forming = size.n_train * row / (1 if plan.strategy == "tiles" else workers)
    rows = size.n_eval + (size.n_train if full else 0)  # those that stream past the training rows
    entries = rows * size.n_train * len(ROW_KINDS) if full else 0
    passes = (tiles if full else 1) * rows * several
    if (
        plan.strategy == "directions"
    ):  # values and derivatives along the step's vectors, and along the shares' on the other side
        passes += 3 * costs.forward * (len(STEP_VECTORS) * size.n_eval + 3 * size.n_train)
    moved = size.n_train * size.row_bytes if plan.strategy == "memory" and workers > 1 else 0
    read = 0
    if plan.strategy == "disk":
        read = math.ceil(rows / plan.chunk) * size.n_train * size.stored_row_bytes
    if plan.strategy == "factored":  # rows anew for every chunk, at about a forward pass's operations
        forming += math.ceil(rows / plan.chunk) * size.n_train * costs.forward / workers
        read = plan.read_by(rows)
    return {
        "forming training rows": forming / OPERATIONS,
        "passes of the sides that stream past them": passes / workers / OPERATIONS,
        "products of rows": 2 * entries * costs.parameters / workers / OPERATIONS,
        "exchanging and reading rows": (moved + read / workers) / bandwidth,
    }


def _plan_cut_model(
    model: Any, config: FisherAnalysisConfig, devices: int, bandwidth: float, prompt: int, completion: int
) -> ClusterPlan:
    """The plan for a model that `checkpoint.sharding` cuts over all devices: each has its part of weights, rows and products, and
    all pass every sequence together.
    """
    settings = config.entropy_analysis
    kernel = settings.fisher_kernel
    n_eval, n_train = settings.eval_batch_size, settings.train_batch_size
    chosen = set(chosen_parameters(model, kernel.filter_modules))
    costs = count_passes(model, prompt, completion, chosen, devices)
    size = KernelSize(n_eval, n_train, costs.parameters, len(ROW_KINDS), largest=costs.largest)
    each, together = int(kernel.memory_budget or DEVICE_MEMORY), max(1, kernel.token_batch_size // costs.tokens)
    one_pass, gathered = together * costs.graph_bytes + LOGIT_BYTES, _gathered_at_a_time(model)
    needed = costs.weight_bytes + gathered + one_pass + fixed_bytes(size) + 4 * size.row_bytes
    if needed > each:
        raise UserError(
            f"a device needs {needed / 2**30:.0f} GiB ({costs.weight_bytes / 2**30:.3g} of weights, {gathered / 2**30:.3g} of "
            f"others' weights at a time, {one_pass / 2**30:.3g} of a pass over {together} sequences, and rows) and has "
            f"{each / 2**30:.0f}: larger devices, more of them, a smaller token_batch_size, or fewer parameters (filter_modules)"
        )
    memory = each - costs.weight_bytes - gathered - one_pass
    plan = plan_kernel(size, memory, strategy=_wanted(kernel.strategy))
    seconds = _seconds(costs, plan, size, 1, bandwidth, kernel.compute_full)
    del seconds["exchanging and reading rows"]
    # A forward pass gathers what the others hold, and so does a backward pass: one for training rows, one a kind of row else.
    tiles = math.ceil(n_train / plan.tile) if kernel.compute_full else 1
    streamed = tiles * (n_eval + (n_train if kernel.compute_full else 0))
    gatherings = (2 * n_train + (1 + len(ROW_KINDS)) * streamed) / together
    seconds["gathering weights"] = gatherings * (devices - 1) * costs.weight_bytes / bandwidth
    left = memory - fixed_bytes(size)
    return ClusterPlan(costs, plan, n_eval, n_train, devices, bandwidth, devices, each, left, seconds, gathered)


def _gathered_at_a_time(model: Any) -> int:
    """Bytes of what is outside of layers, a layer, and the next one, which torch fetches meanwhile."""

    def held(module: Any) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    layers = [held(layer) for layer in layers_gathered_alone(model)]
    return held(model) - sum(layers) + 2 * max(layers, default=0)
