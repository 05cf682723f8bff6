"""The one way in which passes put something in the place of a module's `forward`, for as long as a PassState is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ReplacedForward:
    """Stands on a module as its `forward` attribute, and hides the method of its class.

    Args:
        module: whose forward is replaced.
        instead: called as `instead(module, *args, **kwargs)` in place of the method; may call it by `own_forward`.
    """

    def __init__(self, module: nn.Module, instead: Callable[..., Any]) -> None:
        self._module, self._instead = module, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(self._module, *args, **kwargs)

    def place(self) -> None:
        """From now on calls of the module come here."""
        self._module.forward = self

    def remove(self) -> None:
        """Take the replacement away, where it is there. One that somebody has wrapped in the meantime stays below the wrapper,
        where it does what the method of the class does.
        """
        if vars(self._module).get("forward") is self:
            del self._module.forward


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class computes, whatever stands in its place."""
    return type(module).forward(module, *args, **kwargs)


def wrapped_by_others(module: nn.Module) -> bool:
    """Whether somebody else (accelerate's offloading, a quantiser) has put another forward on this very module."""
    there = vars(module).get("forward")
    return there is not None and not isinstance(there, ReplacedForward)
