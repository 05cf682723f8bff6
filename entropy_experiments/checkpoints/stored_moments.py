"""AdamW's moments as a checkpoint's file holds them, read a parameter at a time.

No optimizer object is made of them: of a model of which every weight is trained they are twice as large as the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.adamw import AdamWParameterState
from rl_training.errors import UserError
from rl_training.run.mapped_file import MappedPages

_KEPT_BYTES = 2**26  # of pages that were read


class StoredMoments(Mapping[str, AdamWParameterState]):
    """name -> the state of one trained parameter, in the parameter's precision and on its device; zeros and step 0 without one.

    Args:
        path: the file that `state` was loaded from.
        state: of an AdamW optimizer.
        names: of its groups' parameters, in their order.
        rates: the learning rate of every group in the analysed step.
        parameters: the model's trainable ones, in the order of iteration.
    """

    def __init__(
        self,
        path: Path,
        state: Mapping[str, Any],
        names: Sequence[Sequence[str]],
        rates: Sequence[float],
        parameters: Mapping[str, Tensor],
    ) -> None:
        self._parameters = parameters
        self._stretches: Mapping[str, slice] = {}
        self._entries: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], float]] = {}
        for group, own, rate in zip(state["param_groups"], names, rates, strict=True):
            for number, name in zip(group["params"], own, strict=True):
                self._entries[name] = (state["state"].get(number, {}), group, float(rate))
        self._path, self._found = path, path.stat()
        self._pages, self._read = MappedPages(path), 0

    def of_stretches(self, parameters: Mapping[str, Tensor], stretches: Mapping[str, slice]) -> StoredMoments:
        """The same of a process's stretches of the parameters along their first dimension."""
        found = copy(self)
        found._parameters, found._stretches = parameters, stretches
        return found

    def stored_types(self) -> dict[str, tuple[torch.dtype, torch.dtype]]:
        """name -> types that the file holds the first and second moments in, of the parameters that have any."""
        found = {name: entry for name, (entry, _, _) in self._entries.items() if entry}
        return {name: (entry["exp_avg"].dtype, entry["exp_avg_sq"].dtype) for name, entry in found.items()}

    def __getitem__(self, name: str) -> AdamWParameterState:
        """Raises UserError where the file was written anew since it was opened."""
        if self._written_anew():
            raise UserError(
                f"{self._path} was written anew while it was analysed, and what is read now may be of another step: analyse it "
                "when nothing writes there"
            )
        entry, group, rate = self._entries[name]
        p, stretch = self._parameters[name].detach(), self._stretches.get(name, ...)
        if self._read > _KEPT_BYTES:
            self._pages.forget()
            self._read = 0
        self._read += 2 * p.numel() * p.itemsize

        def moment(key: str) -> Tensor:
            return entry[key][stretch].to(p) if entry else torch.zeros_like(p)

        beta1, beta2 = map(float, group["betas"])
        return AdamWParameterState(
            exp_avg=moment("exp_avg"),
            exp_avg_sq=moment("exp_avg_sq"),
            step=int(entry["step"]) if entry else 0,
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            max_exp_avg_sq=moment("max_exp_avg_sq") if group.get("amsgrad") else None,
            fused=bool(group.get("fused")),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._entries)

    def _written_anew(self) -> bool:
        """In place: where the file is gone, or another took its name, what is mapped stays."""
        try:
            now = self._path.stat()
        except OSError:
            return False
        before = self._found
        same_file = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
        return same_file and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)
