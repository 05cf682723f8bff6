"""Weights moved for one look and put back, bit for bit, whatever happens in between.

The trainer's weights are training's own: a trial move that was not undone would be training by the probe. Copies are put back in
`finally`; a Ctrl-C during a trial is held back until they are (a second one goes through at once, and `finally` still puts
them back).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn


class TrialMoves:
    """Use as a context: `move` inside as often as wanted; on leaving, the weights are those from before, bit for bit.

    Args:
        parameters: name -> parameter. Copies of them are held inside the context, and nothing else.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)

    @contextmanager
    def begin(self) -> Iterator[TrialMoves]:
        """Copy the weights, and put the copies back on leaving.

        Raises:
            KeyboardInterrupt: on leaving, where Ctrl-C was pressed inside.
        """
        with _interrupts_held_back(), torch.no_grad():
            copies = {name: p.detach().clone() for name, p in self._parameters.items()}
            try:
                yield self
            finally:
                for name, p in self._parameters.items():
                    p.data.copy_(copies[name])

    def move(self, *updates: Mapping[str, Tensor]) -> None:
        """Add updates (name -> tensor of the parameter's shape) to the weights as they are now."""
        for update in updates:
            for name, change in update.items():
                self._parameters[name].data.add_(change.to(self._parameters[name].dtype))


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Nothing is done outside the main thread, where no interrupt arrives, and where Python does not
    handle interrupts: a background job of a shell ignores them, and goes on ignoring them."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:  # whoever insists is let through
            raise KeyboardInterrupt
        held.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(*held[0])
