"""How the gradient rows of one model are formed: batched backward passes with hooks, or one backward pass per sequence.

    hooks   hooks on modules (gradient_hooks): as many passes as the batch has buckets. Held against autograd.
    loop    one forward pass per sequence, one backward pass per objective: plain autograd, which any model allows.
    auto    hooks, and the loop from the first row that cannot be formed or that does not add up.

Both give the same numbers to rounding. Source: docs/theory/fisher-kernel.md, "Rows".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch

from entropy_core.passes.row_check import RowCheck

Method = Literal["auto", "hooks", "loop"]
METHODS: tuple[Method, ...] = ("auto", "hooks", "loop")

# What an operation that hooks or vmap cannot follow raises; a model that is broken raises it in the loop as well.
_FAILURES = (RuntimeError, NotImplementedError, TypeError, AttributeError)
REMEDY = "use PassSettings(method='loop') (of an analysis: entropy_analysis.fisher_kernel.method=loop), or freeze it"


class RowsNotFormedError(ValueError):
    """A parameter whose rows hooks cannot form, or that do not add up to autograd's gradient; names it and its module."""


class SlowRowsWarning(UserWarning):
    """Rows are formed by one backward pass per sequence."""


def _warn(line: str) -> None:
    warnings.warn(line, SlowRowsWarning, stacklevel=2)


class RowFormation:
    """The method in use for one model, and what has been checked of its rows. One object serves any number of calls.

    looping: whether the loop is in use. reason: what hooks failed at, None where they did not. announce: is given one line
    when the loop takes over; a SlowRowsWarning by default. cost: passes that the line speaks of, (loop, hooks), where they are
    more than those of the call at hand.

    Raises ValueError for an unknown method.
    """

    def __init__(
        self,
        method: Method = "auto",
        verify: bool = True,
        announce: Callable[[str], None] = _warn,
        cost: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: choose 'auto', 'hooks' or 'loop'")
        self.method, self.check = method, RowCheck() if verify else None
        self.looping, self.reason = method == "loop", None if method != "loop" else "method=loop was asked for"
        self.copies = False
        self._announce, self._cost = announce, cost

    @property
    def in_use(self) -> Literal["hooks", "loop"]:
        return "loop" if self.looping else "hooks"

    def to_json(self) -> dict[str, str | None]:
        """The method in use, and why where that is the loop."""
        return {"method": self.in_use, "reason": self.reason}

    def recover(self, error: Exception, fed: bool, sequences: int, buckets: int) -> None:
        """Make what comes next avoid `error`, which a stream by hooks met: hooks with copies, or the loop.

        fed: whether rows have reached a sink that cannot be emptied. sequences, buckets: of the batch at hand.
        Raises the error itself where it is none of the hooks', or where it may not be avoided, with the remedy.
        """
        own = isinstance(error, RowsNotFormedError)
        if not own and (not isinstance(error, _FAILURES) or isinstance(error, torch.OutOfMemoryError)):
            raise error
        if not fed and not self.copies and "modified inplace" in str(error):
            self.copies = True  # the model overwrites a module's output, which a hook's view of it does not allow
            return
        if self.method != "auto" or fed:
            if own:
                raise RowsNotFormedError(f"{error}; {REMEDY}") from error
            raise error
        line = str(error).partition("\n")[0]
        self.reason = line if own else f"hooks cannot follow this model ({type(error).__name__}: {line})"
        self.looping = True
        loop, hooks = (sequences, buckets) if self._cost is None else self._cost()
        self._announce(
            f"{self.reason}; one backward pass per sequence instead: about {loop} passes in place of {hooks}"
        )
