"""Checkpoints in the layouts of other systems, told by the names of their files, with what to do with each.

An analysis opens none of these. All but Megatron's and DeepSpeed's universal ones can be imported
(entropy_experiments.checkpoints.readers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

STEP_FOLDER = re.compile(r"(?:checkpoint-|global_steps?_?|step[-_])(\d{1,9})")
"""Names that trainers give to the folder of a step."""
RUN_FOLDERS = ("", "checkpoints", "checkpoint", "ckpts")
"""Where they put these inside a run."""
_DEEPEST = 3  # levels from a step's folder to its files: dcp_checkpoint/_actor, policy/weights
# Where verl, SkyRL, Megatron and prime-rl put the policy, beside a critic and the state of the data.
_POLICY_FOLDERS = ("actor", "policy", "model", "dist_ckpt", "trainer")


@dataclass(frozen=True)
class ForeignLayout:
    """what: in words, for a sentence. weights: how whole weights are had from it, None where it is imported."""

    name: str
    what: str
    weights: str | None = None

    @property
    def imported(self) -> bool:
        """Whether `entropy-experiments import` reads it."""
        return self.weights is None


_Names = set[str]

_VERL = ForeignLayout("verl or SkyRL", "this is a sharded checkpoint of verl or SkyRL (model_world_size_*_rank_*.pt)")
_DEEPSPEED = ForeignLayout("DeepSpeed", "this is a checkpoint of DeepSpeed (ZeRO shards under global_step*/)")
_FSDP_SHARDED = ForeignLayout(
    "FSDP, sharded", "this is a sharded checkpoint of FSDP (optimizer_0/ and pytorch_model_fsdp_0/)"
)
_FSDP_FULL = ForeignLayout("FSDP, full", "this is a checkpoint of FSDP (optimizer.bin, its entries keyed by name)")
_DCP = ForeignLayout("torch DCP", "this is a distributed checkpoint of torch (.metadata and *.distcp)")
_MEGATRON = ForeignLayout(
    "Megatron",
    "this is a checkpoint of Megatron (mp_rank_*/, or dist_ckpt/ with common.pt)",
    "Take its weights in the format of transformers (verl: model/huggingface; else Megatron's own tools). Analyse these with "
    "entropy_analysis.fisher_kernel.preconditioning=none and checkpoint.learning_rate=...",
)
_UNIVERSAL = ForeignLayout(
    "DeepSpeed, universal",
    "this is a universal checkpoint of DeepSpeed (zero/<parameter>/exp_avg.pt)",
    "Import the global_step<N>/ that ds_to_universal.py made it of.",
)


def _any(names: Iterable[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


_TESTS: tuple[tuple[ForeignLayout, Callable[[_Names], bool]], ...] = (
    (_VERL, lambda names: _any(names, r"(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt")),
    (
        _MEGATRON,
        lambda names: (
            _any(names, r"mp_rank_\d+(_\d+)*|iter_\d{7}")
            or {".metadata", "common.pt"} <= names
            or bool(names & {"ckpt_contents.json", "dist_ckpt"})
        ),
    ),
    (
        _UNIVERSAL,
        lambda names: (
            ("latest_universal" in names and not _any(names, r"global_step\d+"))
            or ("zero" in names and _any(names, r".*model_states\.pt"))
        ),
    ),
    (
        _DEEPSPEED,
        lambda names: (
            "zero_to_fp32.py" in names
            or _any(names, r".*zero_pp_rank_\d+.*|.*_optim_states\.pt")
            or ("latest" in names and _any(names, r"global_step\d+"))
        ),
    ),
    (
        _FSDP_SHARDED,
        lambda names: _any(
            names, r"optimizer_\d+|pytorch_model_fsdp_\d+|(optimizer|pytorch_model_fsdp)(_\d+)?_rank\d+\.bin"
        ),
    ),
    (_FSDP_FULL, lambda names: "optimizer.bin" in names or "pytorch_model_fsdp.bin" in names),
    (_DCP, lambda names: ".metadata" in names or _any(names, r"__\d+_\d+\.distcp")),
)


def foreign_layout(folder: Path) -> ForeignLayout | None:
    """The system whose layout the folder has, or the folder of its policy directly inside; None for ordinary checkpoints.

    A folder with an `optimizer.pt` is an ordinary one, whatever lies beside it.
    """
    inside = [folder, *(folder / name for name in _POLICY_FOLDERS)]
    for place in (path for path in inside if path.is_dir()):
        names = {path.name for path in place.iterdir()}
        if "optimizer.pt" in names:
            return None
        found = next((layout for layout, test in _TESTS if test(names)), None)
        if found is not None:
            return found
    return None


def is_foreign_run(folder: Path) -> bool:
    """Whether a folder of steps inside looks like another system's, by names alone."""
    places = [place for name in RUN_FOLDERS if (place := folder / name).is_dir()]
    steps = [
        child for place in places for child in place.iterdir() if STEP_FOLDER.fullmatch(child.name) and child.is_dir()
    ]
    return any(_looks_foreign(step, _DEEPEST) for step in steps)


def _looks_foreign(folder: Path, levels: int) -> bool:
    inside = list(folder.iterdir())
    names = {path.name for path in inside}
    if any(test(names) for _, test in _TESTS):
        return True
    return levels > 1 and any(
        _looks_foreign(path, levels - 1) for path in inside if path.is_dir() and not path.is_symlink()
    )
