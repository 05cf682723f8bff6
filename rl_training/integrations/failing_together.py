"""Processes of which none goes on alone: what one cannot do, none does.

Where one process fails (a prompt that it cannot render, memory, numbers that are not finite) the others wait in their next
exchange, or exchange with whatever that one does next: its gradients, say. So inside `together` every exchange begins with the
question whether all are well. Who fails answers it once, in place of all the exchanges that it misses, and the others fail with
it; the end of the block asks as well.

Where a pass of the model is an exchange itself (weights that are spread over processes), a failure in the midst of one is not
answered: the others wait for that pass until the group's own timeout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from entropy_core.processes import Processes


class OtherProcessFailedError(Exception):
    """None of a library's kinds, so that nobody takes it for trouble of its own and goes on."""


class FailingTogether:
    """All processes of the default group.

    Args:
        device: where the group can send from.

    Attributes:
        processes: to exchange by inside `together`, and outside of it, where nobody asks.
    """

    def __init__(self, device: torch.device) -> None:
        self._asking = Processes.world()
        group = dist.group.WORLD if self._asking.size > 1 else None
        self.processes = Processes(group, explaining=self._exchange)
        self._device = device
        self._inside = self._over = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every process enters it. An exception in one ends the block in all.

        Raises:
            OtherProcessFailedError: another process failed.
        """
        self._inside, self._over = True, False
        try:
            yield
            self._ask()
        except Exception:
            if not self._over:
                with contextlib.suppress(RuntimeError):  # the others may be gone
                    self._asking.any(True, self._device)
            raise
        finally:
            self._inside = False

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        if self._inside:
            self._ask()
        over, self._over = self._over, True  # an exchange that fails is known to the others
        yield
        self._over = over

    def _ask(self) -> None:
        over, self._over = self._over, True
        if over or self._asking.any(False, self._device):
            raise OtherProcessFailedError("another process failed, and its own output says why")
        self._over = False
