"""Whether a model's per-sequence rows may stand for its gradient: found out in the passes in which they are used.

    sum_t row_t = d objective / dtheta          for every trainable parameter, beside autograd in the same backward pass

Rows come from hooks on modules, so a parameter that is used without its module being called (a functional call, a
parametrisation, a factor applied by another module) has none, and its part of a prediction is silently zero. Such models
are still differentiated, by plain backward passes (entropy_core.fold_gradients).

A parameter whose gradient is zero says nothing about its rows (LoRA's A, while B is zero), so it is looked at again in
later passes, until its gradient has been seen.
Source: docs/theory/fisher-kernel.md, "Rows".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from entropy_core.passes.row_check import ROW_SUM_TOLERANCE

# Error, relative to a parameter's own gradient, below which nothing of it is missing; rounding of small gradients is larger
# than ROW_SUM_TOLERANCE of the whole one allows for.
_NOTHING_MISSING = 1e-2
# Passes after which parameters with a gradient are no longer looked at, whatever rounding does to them.
_PASSES = 8


class FoldRows:
    """One model's answer, kept from pass to pass; begun anew when its trainable parameters are others.

    failure: why rows do not serve, None while they do.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._unseen: set[str] = set()
        self._passes = 0
        self.failure: str | None = None

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A pass over these parameters is about to be made."""
        same = self._parameters.keys() == parameters.keys() and all(
            p is parameters[name] for name, p in self._parameters.items()
        )
        if not same:
            self._parameters, self._unseen = dict(parameters), set(parameters)
            self._passes, self.failure = 0, None

    def unseen(self) -> list[str]:
        """Names of the parameters whose gradient the next pass is to be asked for."""
        return [name for name in self._parameters if name in self._unseen]

    def check(self, sums: Mapping[str, Tensor], names: Sequence[str], gradients: Sequence[Tensor | None]) -> None:
        """Hold sums of rows against autograd's gradients in one backward pass.

        sums: (F, *shape) of every parameter, added over folds here. names, gradients: those that were asked for, None where a
        parameter was not used.

        Raises ValueError where they do not agree to ROW_SUM_TOLERANCE (four roundings of weights below float32) of the whole
        gradient, or where a parameter has a gradient and no rows, naming the worst.
        """
        self._passes += 1
        found = {name: sums[name].sum(0) for name in names}
        norms = {name: 0.0 if g is None else _norm(g) for name, g in zip(names, gradients, strict=True)}
        own = {name: _norm(total) for name, total in found.items()}
        asked = set(names)
        others = (_norm(folds.sum(0)) for name, folds in sums.items() if name not in asked)
        scale = math.hypot(*norms.values(), *others) or math.hypot(*own.values())
        if not 0.0 < scale < math.inf:
            return  # says nothing of rows
        errors = {
            name: own[name] if g is None else _norm(found[name] - g.to(found[name]))
            for name, g in zip(names, gradients, strict=True)
        }
        coarsest = max(torch.finfo(p.dtype).eps for p in self._parameters.values())
        allowed = max(ROW_SUM_TOLERANCE, 4 * coarsest) * scale
        worst = max(errors, key=lambda name: errors[name])
        absent = [name for name in names if own[name] == 0.0 < norms[name]]
        if absent or not errors[worst] <= allowed:
            name = max(absent, key=lambda name: norms[name]) if errors[worst] <= allowed else worst
            raise ValueError(
                f"per-sequence gradients of {name!r} do not add up to its gradient (off by {errors[name] / scale:.1e} of "
                "the norm of all): the model uses it other than by calling its module"
            )
        for name in names:
            clear = errors[name] <= max(_NOTHING_MISSING, 4 * coarsest) * norms[name]
            if norms[name] > 0.0 and (clear or self._passes >= _PASSES):
                self._unseen.discard(name)

    def fail(self, why: str) -> None:
        """Rows are not to be used for these parameters; the first line of `why` is kept."""
        self.failure = why.partition("\n")[0] or "per-sequence gradients cannot be formed"


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
