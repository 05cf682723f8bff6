"""What every reader gives: weights, Adam's moments and groups of a checkpoint, its tensors read
when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_training.errors import UserError


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that lies in one file or in several. origin: These files' names, for messages. read:
    Its values, on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class AdamEntry:
    """One parameter's state: steps seen, exp_avg, exp_avg_sq, and max_exp_avg_sq where the
    optimizer keeps it.
    """

    step: int
    first: LazyTensor
    second: LazyTensor
    largest: LazyTensor | None = None


@dataclass(frozen=True)
class OptimizerGroup:
    """A parameter group. keys: Names of its parameters, or numbers where the files name none, in
    the optimizer's order.

    settings: As torch's AdamW has them: lr, betas, eps, weight_decay, amsgrad, maximize and, where
    recorded, decoupled_weight_decay and initial_lr. `lr` is what the file holds: mostly the next
    step's.
    """

    keys: tuple[str | int, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class AdamState:
    """State of AdamW. entries: By the keys of the groups; parameters that never had a gradient have
    none.

    quantised: Whether the moments were stored in 8 bits, so that they are rounded. notes: What
    should be said of them.
    """

    entries: Mapping[str | int, AdamEntry]
    groups: tuple[OptimizerGroup, ...]
    quantised: bool = False
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """Whether the files name the parameters; else they have numbers."""
        return all(isinstance(key, str) for group in self.groups for key in group.keys)

    @property
    def step(self) -> int | None:
        """Of the entry that has seen most steps; None without entries."""
        return max((entry.step for entry in self.entries.values()), default=None)

    def first(self, name: str | int) -> Tensor:
        """exp_avg of a parameter."""
        return self.entries[name].first.read()

    def second(self, name: str | int) -> Tensor:
        """exp_avg_sq of a parameter."""
        return self.entries[name].second.read()

    def with_names(self, names: Sequence[Sequence[str]]) -> AdamState:
        """The same state under the names of each group's parameters, in the groups' order."""
        pairs = [(key, name) for group, given in zip(self.groups, names, strict=True)
                 for key, name in zip(group.keys, given, strict=True)]  # fmt: skip
        entries = {name: self.entries[key] for key, name in pairs if key in self.entries}
        groups = (replace(group, keys=tuple(given)) for group, given in zip(self.groups, names, strict=True))
        return replace(self, entries=entries, groups=tuple(groups))

    def without_idle(self, idle: Callable[[str | int], bool]) -> AdamState:
        """The same state without the parameters that have no moments and of which `idle` says that
        no gradient was expected.

        Trainers of adapters hand frozen parameters to the optimizer as well, which makes no entry
        for them.
        """
        groups = [
            replace(group, keys=tuple(key for key in group.keys if key in self.entries or not idle(key)))
            for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def with_keys(self, change: Callable[[str], str]) -> AdamState:
        """The same state under other names. Raises UserError where two become one."""
        keys = [change(str(key)) for group in self.groups for key in group.keys]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(
                f"two parameters of the optimizer's state are both called {twice!r}: it is damaged; copy it again"
            )
        return self.with_names([[change(str(key)) for key in group.keys] for group in self.groups])


@dataclass(frozen=True)
class TrainedState:
    """A checkpoint as its reader found it.

    layout: Of which trainer, in words. folder: Where it lies. step: Steps taken, None where nothing
    says. weights: By name; empty where `weights_folder` holds them in the files of save_pretrained.
    weights_folder: Where those files, or the configuration and the tokenizer alone, lie; None where
    there are none. adam: None where no optimizer's state was saved. scheduler: The schedule's
    state, plain data. ranks: Processes that wrote it. origins: What was read from which file.
    """

    layout: str
    folder: Path
    step: int | None
    weights: Mapping[str, LazyTensor]
    adam: AdamState | None
    weights_folder: Path | None = None
    scheduler: Mapping[str, Any] | None = None
    ranks: int = 1
    origins: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def weight(self, name: str) -> Tensor:
        """A weight's values, in the precision in which they were saved."""
        return self.weights[name].read()

    def tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Every tensor with what it is, e.g. "exp_avg of 'model.norm.weight'": for checks of
        files.
        """
        for name, weight in self.weights.items():
            yield f"weight {name!r}", weight
        for key, entry in (self.adam.entries if self.adam else {}).items():
            yield f"exp_avg of {key!r}", entry.first
            yield f"exp_avg_sq of {key!r}", entry.second


def reading(path: Path | str, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> LazyTensor:
    """A lazy tensor whose reading says which file failed, in one line."""
    from entropy_experiments.checkpoints.readers.inert_pickle import Damaged

    def checked() -> Tensor:
        try:
            return read()
        except (Damaged, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}; copy the checkpoint again") from error

    return LazyTensor(tuple(shape), dtype, str(path), checked)
