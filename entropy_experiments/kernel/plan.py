"""How a kernel is computed inside a memory budget: in memory, through a gradient store on disk, or in tiles.

    memory   all training rows are kept; the evaluation side streams past them.        passes  n_eval + n_train
    disk     training rows lie in a gradient store; chunks of evaluation rows are      passes  n_eval + n_train,
             kept, and the store is read once a chunk.                                 reading n_chunks * n_train rows
    factored inputs and cotangents of each layer are kept, in memory or on disk, for    passes  n_eval + n_train,
             the training side and a chunk of the evaluation side; rows are formed     reading n_chunks * n_train factors
             of them block by block (entropy_core.factored_rows).
    tiles    a tile of training rows is kept; the evaluation side streams past it,     passes  n_train + n_tiles * n_eval
             and again for every further tile. Nothing is stored.

A row is D numbers (D the parameters that rows are formed of). A pass is one forward with its backward passes over one
sequence. The first that fits is taken: memory, then disk (where disk_budget allows it, and rows are smaller than factors), then
factored (where factors are smaller than rows), then tiles. Another, "sketch", keeps random projections of the training rows
(entropy_core.sketch) and is taken only where it is asked for. Where no matrix is wanted the plan is "directions": no row is
formed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from entropy_core.factored_rows import BLOCK_BYTES
from entropy_experiments.kernel.contraction import ROW_KINDS, STEP_VECTORS
from entropy_experiments.kernel.factor_sizes import FactorSizes
from entropy_experiments.kernel.store.factor_store import CACHE_BYTES
from entropy_experiments.kernel.store.layout import TORCH_DTYPES
from rl_training.errors import UserError

Strategy = Literal["memory", "disk", "factored", "tiles", "sketch", "directions"]
BLOCK_ROWS = 32  # rows of the evaluation side that are one finished block
SHARD_BYTES = 2**29  # factors in a file
STREAMED_ROWS = 128
"""Evaluation sequences in a chunk whose factors go to disk: an interrupted run repeats a chunk."""
SAMPLE_BYTES = 2**28  # of one parameter's rows that checks form
HELD_VECTORS = {
    "gradient of the loss": 1,
    "gradients of entropy": 2,
    "gradient of another step, or part of one": 1,
    "weights before a step, or a direction": 1,
}
"""Tensors of D numbers that are held beside the model, at most. Moments stay in the checkpoint's file; the step, its parts and P
are formed when they are read."""
HELD_LATER = 2
"""Of them, those that are formed when kernels are done: the gradients of entropy."""
VECTORS_BESIDE_ROWS = {
    "P": 1,
    "the step, its parts": len(STEP_VECTORS),
    "metrics of shares and of effects of leaving out": 2,
}
"""More of them where all rows are kept: formed once, since every pass is multiplied with them."""


@dataclass(frozen=True)
class KernelSize:
    """What is to be computed: sequences on both sides, D, how many kinds of rows the evaluation side has, how many numbers the
    largest parameter has, and how large the factors of rows are (None: rows are formed by a loop, or it is not known).
    """

    n_eval: int
    n_train: int
    parameters: int
    objectives: int = len(ROW_KINDS)
    storage: str = "float32"
    largest: int = 0
    factors: FactorSizes | None = None

    @property
    def row_bytes(self) -> int:
        """Of one row in float32."""
        return 4 * self.parameters

    @property
    def stored_row_bytes(self) -> int:
        return TORCH_DTYPES[self.storage].itemsize * self.parameters


@dataclass(frozen=True)
class KernelPlan:
    """strategy; tile: training rows held (or read) at a time, of factors those in a shard; chunk: evaluation rows in a block;
    at_once: of them those whose factors are in memory at a time, on their way to the disk; 0: all. streamed: bytes of `disk` that
    such blocks take.

    memory: bytes that rows take at most, beside the model and the passes' own; disk: bytes of the gradient store; passes:
    sequences that go through the model, forward and backward, for the evaluation kernels; reading: bytes read from disk.
    """

    strategy: Strategy
    tile: int
    chunk: int
    memory: int
    disk: int
    passes: int
    reading: int
    at_once: int = 0
    streamed: int = 0

    def read_by(self, rows: int) -> float:
        """Bytes of factors that are read when so many rows meet the training side: its own for every block, theirs once."""
        return math.ceil(rows / self.chunk) * (self.disk - self.streamed) + rows / self.chunk * self.streamed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fixed_bytes(size: KernelSize, strategy: Strategy | None = None) -> int:
    """Bytes that are held beside what the plan keeps: vectors over all parameters, and one parameter's rows of a block."""
    vectors = sum(HELD_VECTORS.values())
    if strategy == "directions":
        return vectors * size.row_bytes
    if strategy == "factored":  # of one parameter P, the step's vectors, and what they are made of
        work = 2 * (1 + len(STEP_VECTORS)) + sample_rows(size.largest)
        return vectors * size.row_bytes + work * 4 * size.largest + BLOCK_BYTES + CACHE_BYTES
    if strategy == "memory":
        vectors += sum(VECTORS_BESIDE_ROWS.values())
    return vectors * size.row_bytes + BLOCK_ROWS * 4 * size.largest


def plan_directions(size: KernelSize, memory: int, one_pass: int = 0) -> KernelPlan:
    """The plan without a matrix. Raises UserError where the vectors that it holds do not fit into `memory` bytes, those of a pass
    (`one_pass`) left out.
    """
    held = fixed_bytes(size, "directions")
    if held > memory:
        raise UserError(
            f"{sum(HELD_VECTORS.values())} vectors over {size.parameters:,} parameters take {_gib(held)}, and "
            f"{_gib(max(memory, 0))} are left for them beside the model and a pass of {_gib(one_pass)}: raise "
            "entropy_analysis.fisher_kernel.memory_budget, or lower its token_batch_size, which bounds a pass"
        )
    return KernelPlan("directions", size.n_train, size.n_eval, 0, 0, size.n_eval + size.n_train, 0)


def plan_kernel(
    size: KernelSize,
    memory: int,
    disk: int = 0,
    *,
    save_gradients: bool = False,
    strategy: Strategy | None = None,
    processes: int = 1,
) -> KernelPlan:
    """The plan for `size` with `memory` bytes for rows and `disk` bytes for a gradient store.

    Args:
        size: what is to be computed.
        memory: bytes for everything that is held beside the model and its passes.
        disk: bytes for a gradient store.
        save_gradients: the store is wanted whatever the memory.
        strategy: take this one; None: the first that fits, memory before disk before tiles.
        processes: how many share the disk.

    Raises:
        UserError: where not even one row a side fits, or the store does not fit into the disk budget, saying what is needed.
    """
    factored = (
        None if save_gradients or strategy not in (None, "factored") else _plan_factored(size, memory, disk, processes)
    )
    left = memory - fixed_bytes(size)
    least = 2 * max(size.row_bytes, size.objectives * size.row_bytes)
    if strategy == "factored" or (left < least and factored is not None):
        if factored is None:
            raise UserError(_no_room_for_factors(size, memory, save_gradients))
        return factored
    if left < least:
        raise UserError(_no_room_for_rows(size, memory, disk, least))
    store, in_memory = size.n_train * size.stored_row_bytes, size.n_train * size.row_bytes
    if save_gradients:  # the evaluation side's rows as well, of two kinds: a shard of both is held while it is written
        if strategy == "tiles":
            raise UserError("strategy=tiles keeps no rows: leave it at auto, or leave save_gradients out")
        store += 2 * size.n_eval * size.stored_row_bytes
        in_memory += 2 * min(size.n_train, size.n_eval, BLOCK_ROWS) * size.row_bytes
    fits = in_memory + fixed_bytes(size, "memory") - fixed_bytes(size) + _streaming(size) <= left
    if save_gradients and strategy is None:
        strategy = "memory" if fits else "disk"
    smaller = size.factors is not None and size.factors.row_bytes() < size.row_bytes
    if strategy is None and factored is not None and smaller and not fits:
        return factored
    if strategy is None:
        strategy = "memory" if fits else ("disk" if store <= disk else "tiles")
    if (strategy == "disk" or save_gradients) and store > disk:
        raise UserError(
            f"the gradient store takes {_gib(store)} on disk, and disk_budget is {_gib(disk)}: raise "
            "entropy_analysis.fisher_kernel.disk_budget, store in bfloat16 (gradient_dtype), or leave save_gradients out"
        )
    if strategy == "memory" and not fits:
        need = f"all training rows take {_gib(in_memory)}, and {_gib(left)} are left for them"
        raise UserError(f"{need}: let the plan choose (strategy=auto)")
    if strategy == "memory":
        chunk, stored = min(BLOCK_ROWS, size.n_eval), store if save_gradients else 0
        return KernelPlan("memory", size.n_train, chunk, in_memory, stored, size.n_eval + size.n_train, 0)
    return _plan_disk(size, left, store) if strategy == "disk" else _plan_tiles(size, left)


def _plan_disk(size: KernelSize, left: int, store: int) -> KernelPlan:
    tile = min(size.n_train, BLOCK_ROWS, max(1, int(0.3 * left / size.row_bytes)))
    chunk = min(size.n_eval, max(1, int((left / size.row_bytes - tile) / size.objectives)))
    held = (chunk * size.objectives + tile) * size.row_bytes
    reading = math.ceil(size.n_eval / chunk) * size.n_train * size.stored_row_bytes
    return KernelPlan("disk", tile, chunk, held, store, size.n_eval + size.n_train, reading)


def _plan_tiles(size: KernelSize, left: int) -> KernelPlan:
    tile = min(size.n_train, max(1, int((left - _streaming(size)) / size.row_bytes)))
    tiles = math.ceil(size.n_train / tile)
    tile = math.ceil(size.n_train / tiles)
    passes = size.n_train + tiles * size.n_eval
    return KernelPlan("tiles", tile, min(BLOCK_ROWS, size.n_eval), tile * size.row_bytes, 0, passes, 0)


def _no_room_for_rows(size: KernelSize, memory: int, disk: int, least: int) -> str:
    remedy = "raise entropy_analysis.fisher_kernel.memory_budget, or restrict the rows with filter_modules"
    if size.factors is not None and size.n_train * size.factors.row_bytes() > disk:
        room = _gib(1.05 * size.n_train * size.factors.row_bytes())
        remedy = f"allow their factors on disk (entropy_analysis.fisher_kernel.disk_budget, {room}), {remedy}"
    return (
        f"a memory budget that leaves {_gib(max(memory, 0))} for gradients is too small for one row a side: with "
        f"{size.parameters:,} parameters it takes {_gib(fixed_bytes(size) + least)}; {remedy}"
    )


def _plan_factored(size: KernelSize, memory: int, disk: int, processes: int) -> KernelPlan | None:
    """In memory where that leaves room for enough evaluation sequences, else on disk, else in memory as well as it goes; None
    where nothing fits. Evaluation sequences go to disk too where that makes larger chunks.
    """
    if size.factors is None:
        return None
    left, one = memory - fixed_bytes(size, "factored"), size.factors.most_bytes(size.objectives)
    apart = HELD_LATER * size.row_bytes  # factors on disk leave no memory behind when these vectors come
    train, wanted = size.n_train * size.factors.row_bytes(), min(size.n_eval, max(BLOCK_ROWS, size.n_train // 2))
    shard = min(size.n_train, max(1, SHARD_BYTES // size.factors.most_bytes()))
    on_disk = train + wanted * one > left and int(1.05 * train) <= disk  # shards are padded
    room = left + apart - shard * size.factors.most_bytes() if on_disk else left - train
    chunk = min(wanted, int((left + apart if on_disk else room) // one))
    if room < 0 or chunk < 1:
        return None
    held = chunk * one + (0 if on_disk else train)
    stored = int(1.05 * train) if on_disk else 0
    larger, at_once, streamed = _streamed_by_disk(size, disk - stored, processes), 0, 0
    if on_disk and larger >= 2 * chunk:
        chunk, at_once = larger, chunk
        streamed = processes * int(1.05 * chunk * one)
    passes = size.n_eval + size.n_train
    plan = KernelPlan("factored", shard, chunk, held, stored + streamed, passes, 0, at_once, streamed)
    return replace(plan, reading=int(plan.read_by(size.n_eval)))


def _streamed_by_disk(size: KernelSize, disk: int, processes: int) -> int:
    """Evaluation sequences of a chunk whose factors go to disk, of which every process has one at a time."""
    assert size.factors is not None
    one = 1.05 * size.factors.most_bytes(size.objectives) * processes
    shared = math.ceil(max(size.n_eval, size.n_train) / processes)
    return max(0, min(STREAMED_ROWS, shared, int(disk / one)))


def _no_room_for_factors(size: KernelSize, memory: int, save_gradients: bool) -> str:
    if save_gradients:
        return "strategy=factored keeps no rows: leave it at auto, or leave save_gradients out"
    if size.factors is None:
        return "strategy=factored needs rows formed by hooks: leave strategy or method at auto"
    one, train = size.factors.most_bytes(size.objectives), size.n_train * size.factors.row_bytes()
    return (
        f"factors of {size.n_train} training rows take {_gib(train)}, and {_gib(fixed_bytes(size, 'factored') + one)} of memory "
        f"beside the model are needed with them on disk; {_gib(max(memory, 0))} are left: raise "
        "entropy_analysis.fisher_kernel.memory_budget or disk_budget"
    )


def sample_rows(largest: int) -> int:
    """Training rows that are formed of factors for checks, a parameter at a time; largest: numbers of the largest."""
    return max(1, min(BLOCK_ROWS, SAMPLE_BYTES // (4 * max(1, largest))))


def plan_sketch(size: KernelSize, memory: int, numbers: int) -> KernelPlan:
    """The plan with sketches of `numbers` a row. Raises UserError where they do not fit into `memory` bytes."""
    held = 4 * numbers * (size.n_train + BLOCK_ROWS * size.objectives)
    if held + fixed_bytes(size) > memory:
        raise UserError(
            f"sketches of {size.n_train} training rows take {_gib(held)}, and {_gib(memory - fixed_bytes(size))} are left for "
            "them: lower entropy_analysis.fisher_kernel.projection_dim, or raise memory_budget"
        )
    return KernelPlan("sketch", 16, min(BLOCK_ROWS, size.n_eval), held, 0, size.n_eval + size.n_train, 0)


def _streaming(size: KernelSize) -> int:
    """What a pass holds beside the rows that are kept: one row."""
    return size.row_bytes


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
