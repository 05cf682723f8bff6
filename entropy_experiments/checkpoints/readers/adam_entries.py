"""The state dict of a torch optimizer, its tensors still on disk, as `AdamState`; only keys of an
allow-list are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.bitsandbytes_state import from_bitsandbytes, is_bitsandbytes
from entropy_experiments.checkpoints.readers.group_settings import checked_settings
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from entropy_experiments.checkpoints.readers.trained_state import (
    AdamEntry,
    AdamState,
    LazyTensor,
    OptimizerGroup,
    reading,
)
from rl_training.errors import UserError
from rl_training.run.optimizer_relatives import HARMLESS_GROUP_KEYS, REQUIRED_GROUP_KEYS, name_by_keys
from rl_training.run.optimizer_state import WITHOUT_IT

_KEPT = (REQUIRED_GROUP_KEYS | HARMLESS_GROUP_KEYS) - {
    "params",
    "param_names",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
}


def lazy(path: Path, value: Any) -> Any:
    """A stored tensor as a lazy one, anything else as it is."""
    if not isinstance(value, StoredTensor):
        return value
    return reading(path, value.shape, value.dtype, value.read)


def adam_state(where: Path, content: Any) -> AdamState:
    """The state of AdamW from {"state": key -> fields, "param_groups": [...]}, tensors being
    `LazyTensor`.

    Keys are numbers or names. Raises UserError for what is not the state of AdamW or of
    bitsandbytes' AdamW, named by its keys.
    """
    entries, groups = _structure(where, content)
    if is_bitsandbytes(entries, groups):
        return from_bitsandbytes(where, entries, groups)
    other = name_by_keys(entries, groups)
    if other is not None:
        raise UserError(f"{where} is not the state of AdamW but of {other}, whose step cannot be split: {WITHOUT_IT}")
    if not entries:
        raise UserError(f"{where} holds no moments: it was saved before the first step; take a later checkpoint")
    read = {}
    for key, fields in entries.items():
        moments = [fields[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if name in fields]
        check_moments(where, key, moments)
        read[key] = AdamEntry(count_of(where, key, fields["step"]), *moments)
    return AdamState(read, optimizer_groups(where, groups))


def check_moments(where: Path, key: Any, moments: list[Any]) -> None:
    """Raises UserError unless all are tensors of one shape."""
    if not all(isinstance(moment, LazyTensor) for moment in moments) or len({m.shape for m in moments}) != 1:
        raise UserError(
            f"{where}, entry {str(key)[:80]!r}: its moments are no tensors of one shape: it is damaged; copy it again"
        )


def count_of(where: Path, key: Any, step: Any) -> int:
    """Steps an entry has seen. Raises UserError for what is no count."""
    if isinstance(step, LazyTensor):
        step = step.read().item() if math.prod(step.shape) == 1 else None
    if not isinstance(step, int | float) or isinstance(step, bool) or not 1 <= step < 1 << 40 or int(step) != step:
        raise UserError(f"{where}, entry {str(key)[:80]!r}: its step is no count: it is damaged; copy it again")
    return int(step)


def optimizer_groups(where: Path, groups: list[Mapping[str, Any]], **given: Any) -> tuple[OptimizerGroup, ...]:
    """The groups' settings as torch's AdamW has them; given: settings that the files do not
    hold.
    """
    found = []
    for group in groups:
        settings = {name: plain(group[name]) for name in _KEPT & group.keys()} | given
        found.append(OptimizerGroup(tuple(group["params"]), checked_settings(where, settings)))
    keys = [key for group in found for key in group.keys]
    if len(set(keys)) < len(keys):
        raise UserError(f"{where}: a parameter is in two groups: it is damaged; copy it again")
    return tuple(found)


def plain(value: Any) -> Any:
    """A number that was saved as a tensor, as a number."""
    if isinstance(value, LazyTensor) and math.prod(value.shape) == 1:
        return value.read().item()
    return list(map(plain, value)) if isinstance(value, list | tuple) else value


def _structure(where: Path, content: Any) -> tuple[dict[Any, Mapping[str, Any]], list[Mapping[str, Any]]]:
    entries, groups = (content.get("state"), content.get("param_groups")) if isinstance(content, dict) else (None, None)
    if (
        not isinstance(entries, dict)
        or not isinstance(groups, list)
        or not groups
        or not all(isinstance(entry, dict) for entry in entries.values())
        or not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        or not all(isinstance(key, str | int) for group in groups for key in group["params"])
    ):
        raise UserError(f"{where} is not the state of an optimizer of torch: {WITHOUT_IT}")
    keys = {key for group in groups for key in group["params"]}
    # Under FSDP1 an entry has the key that its group has; torch writes numbers as numbers or as texts.
    entries = {_as_in(key, keys): entry for key, entry in entries.items() if entry}
    stray = sorted(map(str, entries.keys() - keys))
    if stray:
        raise UserError(
            f"{where} has an entry {stray[0][:80]!r} that belongs to no group: it is damaged; copy it again"
        )
    return entries, groups


def _as_in(key: Any, keys: set[Any]) -> Any:
    return int(key) if key not in keys and isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
