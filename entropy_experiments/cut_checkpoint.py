"""A checkpoint's model cut over the processes of a launch by torch's fully_shard (FSDP2): `checkpoint.sharding`.

Each process holds a stretch of every weight and of its moments. They load one after another, since each reads the whole model
before it lets go of what others hold: a machine needs room for one model beside the stretches.
Source: docs/decisions/0017-a-model-cut-over-processes.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_core.cut_weights import weights_cut
from entropy_core.passes.forward import innermost_model
from entropy_core.processes import Processes
from entropy_experiments.checkpoint_loader import Checkpoint, load_as_configured
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.errors import ShareDone, UserError


def refuse_sharding(processes: Processes, resume: bool) -> None:
    """Raises UserError where a model cannot be cut over these processes, or finished pieces are to be gone on with."""
    if processes.size == 1:
        raise UserError(
            "checkpoint.sharding cuts the model over several processes, and there is one: start it by torchrun "
            "--nproc-per-node N -m entropy_experiments analyze ..., or leave it out"
        )
    if resume:
        raise UserError(
            "checkpoint.sharding keeps no finished pieces to --resume with: start anew, with --overwrite where a folder is in "
            "the way"
        )


@contextmanager
def opened_checkpoint(path: Path, config: FisherAnalysisConfig, launch: Processes) -> Iterator[Checkpoint]:
    """The checkpoint that is analysed: whole in every process, or cut over all of them.

    Raises:
        UserError: as `load_checkpoint`, and for weights that cannot be cut.
    """
    chosen = config.checkpoint

    def load() -> Checkpoint:
        return load_as_configured(path, config, None if chosen.sharding is None else "cpu")

    if chosen.sharding is None:
        yield load()
    else:
        with _cut_over(launch, load, chosen.on_cpu) as checkpoint:
            yield checkpoint


@contextmanager
def own_results(target: Path, config: FisherAnalysisConfig, launch: Processes) -> Iterator[tuple[Path, Processes]]:
    """Where this process writes, and who shares its work.

    Where the model is cut, all do all of the work in step, each as if alone, and the first one's results are kept.
    """
    if config.checkpoint.sharding is None:
        yield target, launch
    elif launch.is_root:
        yield target, Processes()
    else:
        with tempfile.TemporaryDirectory() as thrown_away:
            yield Path(thrown_away) / target.name, Processes()
            raise ShareDone


@contextmanager
def _cut_over(processes: Processes, load: Callable[[], Checkpoint], on_cpu: bool) -> Iterator[Checkpoint]:
    """The checkpoint, its model cut over all processes, inside `entropy_core.cut_weights.weights_cut`.

    Args:
        processes: of the launch.
        load: reads the whole checkpoint onto the CPU. What it raises in the first process is raised in all.
        on_cpu: whether the stretches stay on the CPU.

    Raises:
        UserError: as `load`, and for weights of several precisions.
    """
    from torch.distributed.device_mesh import init_device_mesh

    device = "cpu" if on_cpu or not torch.cuda.is_available() else "cuda"
    mesh, found = init_device_mesh(device, (processes.size,)), list[Checkpoint]()
    for turn in range(processes.size):

        def take(turn: int = turn) -> None:
            if processes.rank == turn:
                checkpoint = load()
                _cut(checkpoint.model, mesh)
                found.append(checkpoint)

        processes.from_root(take)
        if turn > 0:
            take()
        processes.meet()
    (checkpoint,) = found
    with weights_cut(checkpoint.model, processes) as cut:
        moments = checkpoint.optimizer
        own = None if moments is None else moments.of_stretches(cut.trainable(), cut.stretches)
        yield replace(checkpoint, optimizer=own)


def _cut(model: nn.Module, mesh: Any) -> None:
    """Cut each of the model's layers, and what is left."""
    from torch.distributed.fsdp import fully_shard

    precisions = {p.dtype for p in model.parameters()}
    if len(precisions) > 1:
        raise UserError(
            f"the model has weights of {len(precisions)} precisions ({', '.join(sorted(map(str, precisions)))}), and "
            "checkpoint.sharding gathers those of a layer together: set checkpoint.dtype=float32"
        )
    for layer in layers_gathered_alone(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)


def layers_gathered_alone(model: nn.Module) -> list[nn.Module]:
    """Those that transformers says are not to be split; what is outside of them is gathered together."""
    kinds: Any = getattr(innermost_model(model), "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in kinds]
