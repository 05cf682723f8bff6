"""What a watch has learned, kept in the trainer's state: the critic's sums, estimates of all that was watched, the pool.

`trainer_state.json` keeps `stateful_callbacks` as it is. The critic's sums are symmetric, float64, and stand there as the upper
triangle in base64 (some 100 kB); pairs as one list a number. All of it is checked when it is read.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_core.bias_correction import PairedEstimates
from rl_training.probe.watch import EntropyWatch, WatchedChange

STATE_KEY = "entropy_probe_watch"
_PAIR = tuple(f.name for f in fields(PairedEstimates))
_NUMBERS = (*_PAIR, "entropy", "steps")


class WatchHistory:
    """Shared with the trainer's state from `begin` on."""

    def __init__(self) -> None:
        self._record: dict[str, Any] = _empty()

    def begin(self, callbacks: dict[str, Any], last_step: int, watch: EntropyWatch) -> str | None:
        """A run begins after `last_step`: load what `callbacks` hold into `watch`.

        Returns:
            Why what is there cannot be used; None where it was, or where there is none.
        """
        found, self._record = callbacks.get(STATE_KEY), _empty()
        callbacks[STATE_KEY] = self._record
        if found is None or found == _empty():  # nothing was watched before it was saved
            return None
        try:
            record = _checked(found, last_step)
            watch.load(_decoded(record["critic"]), _pairs(record))
        except ValueError as error:
            return f"the checkpoint's record of the watch is damaged ({error})"
        self._record = callbacks[STATE_KEY] = record
        return None

    def add(self, step: int, found: WatchedChange, watch: EntropyWatch, source: Mapping[str, Any]) -> None:
        """Note what was watched up to a step, counted from 1, and what is known after it. source: of the sequences watched."""
        self._record["step"].append(step)
        values = {name: float(getattr(found.pair, name)) for name in _PAIR}
        for name, value in {**values, "entropy": found.entropy, "steps": float(found.steps)}.items():
            self._record[name].append(value if math.isfinite(value) else None)
        self._record["critic"] = _encoded(watch.state())
        self._record["source"] = dict(source)

    @property
    def source(self) -> Any:
        """As it was given to `add` last; None where there is none. It is a file's, and not checked."""
        return self._record.get("source")


def _empty() -> dict[str, Any]:
    return {"critic": None, "source": None, "step": [], **{name: [] for name in _NUMBERS}}


def _checked(found: Any, last_step: int) -> dict[str, Any]:
    """A record of the steps up to `last_step`. Raises ValueError."""
    if not isinstance(found, Mapping) or not isinstance(found.get("step"), list):
        raise ValueError("it is no record")
    steps = found["step"]
    if any(not isinstance(s, int) or isinstance(s, bool) for s in steps) or steps != sorted(set(steps)):
        raise ValueError("its steps do not ascend")
    if steps and steps[-1] > last_step:
        raise ValueError(f"it goes beyond step {last_step}")
    out: dict[str, Any] = {"critic": found.get("critic"), "source": found.get("source"), "step": list(steps)}
    for name in _NUMBERS:
        values = found.get(name)
        if not isinstance(values, list) or len(values) != len(steps):
            raise ValueError(f"it has not one {name} for each step")
        known = [v for v in values if v is not None]
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in known):
            raise ValueError(f"a {name} is not a number")
        if name in ("quiet_variance", "difference_variance") and any(v < 0 for v in known):
            raise ValueError(f"a {name} is negative")
        if name in ("quiet", "freedom", "entropy", "steps") and (
            len(known) != len(steps) or (name in ("freedom", "steps") and min(known, default=1) < 1)
        ):
            raise ValueError(f"a {name} is missing or out of range")
        out[name] = list(values)
    return out


def _pairs(record: Mapping[str, Any]) -> list[tuple[PairedEstimates, float, int]]:
    columns = [[math.nan if v is None else float(v) for v in record[name]] for name in _NUMBERS]
    return [(PairedEstimates(*row[:-2]), row[-2], int(row[-1])) for row in zip(*columns, strict=True)]


def _encoded(state: Mapping[str, Any]) -> dict[str, Any]:
    sums: Tensor = state["sums"]
    rows, columns = torch.triu_indices(sums.shape[1], sums.shape[2])
    upper = sums[:, rows, columns].numpy().astype("<f8")
    return {
        "shape": list(sums.shape),
        "upper": base64.b64encode(upper.tobytes()).decode("ascii"),
        "steps_since": state["steps_since"],
        "sum": state["sum"],
    }


def _decoded(found: Any) -> dict[str, Any]:
    """Of `_encoded`. Raises ValueError."""
    if not isinstance(found, Mapping) or not isinstance(found.get("upper"), str):
        raise ValueError("the critic is missing")
    shape = found.get("shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and 0 < n <= 4096 for n in shape)):
        raise ValueError("the critic has no shape")
    folds, size, other = shape
    try:
        upper = np.frombuffer(base64.b64decode(found["upper"], validate=True), dtype="<f8")
    except (binascii.Error, ValueError) as error:
        raise ValueError("the critic is not legible") from error
    if size != other or len(upper) != folds * size * (size + 1) // 2:
        raise ValueError("the critic is cut short")
    sums = torch.zeros(folds, size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size)
    values = torch.from_numpy(upper.astype(np.float64)).reshape(folds, -1)
    sums[:, rows, columns] = values
    sums[:, columns, rows] = values
    return {"sums": sums, "steps_since": found.get("steps_since"), "sum": found.get("sum")}
