"""The kernel by this project, by other libraries and by hand: one implementation a file.

Each file has NEEDS (distributions whose versions count), ATTENTION (transformers' name of the implementation it can
work with), `wrap(case, cut) -> handle` (once, not timed) and `kernel(handle, case) -> (n_rows, n_columns)` (timed). `cut`: logits
from the first position that is needed only, where the library leaves the loss to its user. One has `prepare(handle, case)`, not
timed, before every `kernel`, which takes what it gives instead of the handle.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from kernel_parts.cases import Case, Part, parts
from torch import Tensor

IMPLEMENTATIONS = {
    "plain": "one plain forward-backward over the same sequences, no kernel: the floor",
    "plain_walk": "one more walk back over the evaluation side: what KH may cost on top of K1",
    "ours": "entropy_core, K1",
    "ours_both": "entropy_core, K1 and KH together",
    "vmap": "torch.func, vmap(grad)",
    "opacus": "opacus, GradSampleModule",
    "backpack": "backpack, BatchGrad",
    "bergson": "bergson, in-memory collector and scorer",
    "kronfluence": "kronfluence, pairwise scores",
    "dattri": "dattri, TracIn",
    "traker": "traker, functional gradient computer",
    "opacus-cut": "opacus, its user cuts the logits to completions by hand",
    "backpack-cut": "backpack, likewise",
    "vmap-cut": "torch.func, likewise",
}
SLOW = ("kronfluence", "dattri", "traker")


def implementation(name: str) -> tuple[ModuleType, bool]:
    """Its module, and whether it cuts the logits."""
    if name not in IMPLEMENTATIONS:
        raise SystemExit(f"unknown implementation {name!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    return import_module(f"kernel_peers.{name.removesuffix('-cut')}"), name.endswith("-cut")


def store_and_stream(
    case: Case, rows_of: Callable[[Part], dict[str, Tensor]], token_batch_size: int | None = None
) -> Tensor:
    """K from per-sequence gradients of a part (name -> (n, *shape)): columns kept, rows contracted part by part."""
    stored = [(part.indices, rows_of(part)) for part in parts(case.columns, token_batch_size)]
    out = torch.zeros(len(case.rows), len(case.columns), device=case.rows.device)
    for part in parts(case.rows, token_batch_size):
        rows = rows_of(part)
        for name, p in case.preconditioner.items():
            left = (rows[name] * p).flatten(1)
            for indices, columns in stored:
                out[part.indices[:, None], indices] += left @ columns[name].flatten(1).T
    return out
