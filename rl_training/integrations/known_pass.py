"""Numbers of a forward pass that was made already, used in place of a pass of our own once they are seen to be the same.

    the trainer's      the loss's own pass over what it trains on (trainer_pass)
    the last step's    the pass after the step before, over sequences that are watched for several steps

Neither is trusted: at the first use, and again at the second, fourth, eighth ... one, both are computed for a few sequences and
compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.critic import PROJECTED
from entropy_core.scores import TokenStatistics
from entropy_core.watched_pass import WatchedPass

# Largest mean difference of a token's log-probability and entropy, nats: what float32 and another layout of rows explain. A step
# moves them by 1e-2 and more.
_SAME = 1e-4

_COMPARED = 8
"""Sequences, at each comparison."""

Ours = Callable[[SequenceBatch], WatchedPass]


class KnownPass:
    """whose: "the trainer's", for the words of `trouble`."""

    def __init__(self, whose: str) -> None:
        self._whose = whose
        self._uses = 0
        self.trouble: str | None = None
        """Why the numbers are not used; None while they agree with ours."""

    def completed(self, found: WatchedPass, known: Tensor, batch: SequenceBatch, ours: Ours) -> WatchedPass:
        """Numbers of the whole batch.

        Args:
            found: of the sequences in `known`; it is written into.
            known: (N,) bool.
            batch: all sequences, the same in all processes.
            ours: makes a pass of our own, hidden states included.
        """
        if self.trouble is not None or not bool(known.any()):
            return ours(batch)
        self._uses += 1
        wanted = ~known
        if compared := self._uses & (self._uses - 1) == 0:
            wanted[known.nonzero()[:_COMPARED, 0]] = True
        if not bool(wanted.any()):
            return found
        rest = wanted.nonzero()[:, 0]
        some = batch.select(rest)
        own = ours(some)
        if compared:
            self.trouble = self._difference(_rows(found, rest), own, some, known[rest])
            if self.trouble is not None:
                return ours(batch)
        for name in ("logprobs", "entropies"):
            whole, part = getattr(found.statistics, name), getattr(own.statistics, name)
            whole[rest] = part.to(whole)
        if found.hidden is None or own.hidden is None:
            return WatchedPass(found.statistics, None)
        found.hidden[rest] = own.hidden
        return found

    def _difference(self, found: WatchedPass, own: WatchedPass, batch: SequenceBatch, known: Tensor) -> str | None:
        mask = batch.completion_mask & known[:, None]
        tokens = int(mask.sum())
        for name, what in (("logprobs", "log-probabilities"), ("entropies", "entropies")):
            gap = (getattr(found.statistics, name).double() - getattr(own.statistics, name).double())[mask].abs()
            off = float(gap.sum()) / tokens
            if not off <= _SAME:
                return f"{self._whose} {what} differ from ours by {off:.1g} nats a token in the mean"
        if found.hidden is not None and own.hidden is not None:
            gap, size = (found.hidden - own.hidden)[mask].norm(), own.hidden[mask].norm()
            if not float(gap) <= 1e-2 * float(size):
                return f"{self._whose} hidden states differ from ours"
        return None


def _rows(found: WatchedPass, rows: Tensor) -> WatchedPass:
    statistics = TokenStatistics(found.statistics.logprobs[rows], found.statistics.entropies[rows])
    return WatchedPass(statistics, None if found.hidden is None else found.hidden[rows])


class LastPass:
    """The pass after the last step, by sequence: the pass before the next one, as long as nothing else moved the weights."""

    def __init__(self) -> None:
        self._known = KnownPass("the last step's")
        self._values: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._step = -1

    @property
    def trouble(self) -> str | None:
        """As KnownPass has it."""
        return self._known.trouble

    def forget(self) -> None:
        """Something else than the step moved the weights."""
        self._values, self._step = {}, -1

    def note(self, step: int, names: list[str], batch: SequenceBatch, after: WatchedPass) -> None:
        """Keep the pass after `step`. names: of the batch's sequences."""
        self._step, self._values = step, {}
        for n, name in enumerate(names):
            drawn = batch.completion_mask[n]
            hidden = None if after.hidden is None else after.hidden[n, drawn]
            self._values[name] = (after.statistics.logprobs[n, drawn], after.statistics.entropies[n, drawn], hidden)

    def before(self, step: int, names: list[str], batch: SequenceBatch, ours: Ours) -> WatchedPass:
        """Numbers of `batch` before `step`."""
        values = self._values if step == self._step + 1 else {}
        shape, device = batch.input_ids.shape, batch.device
        known = torch.tensor([name in values for name in names], device=device)
        some = next(iter(values.values()), None)
        dtype = torch.float32 if some is None else some[0].dtype
        logprobs = torch.zeros(shape, dtype=dtype, device=device)
        entropies = torch.zeros(shape, dtype=torch.float64, device=device)
        hidden = None if some is None or some[2] is None else torch.zeros((*shape, PROJECTED), device=device)
        for n, name in enumerate(names):
            if name not in values:
                continue
            drawn, (its_logprobs, its_entropies, its_hidden) = batch.completion_mask[n], values[name]
            logprobs[n, drawn], entropies[n, drawn] = its_logprobs, its_entropies
            if hidden is not None and its_hidden is not None:
                hidden[n, drawn] = its_hidden
        return self._known.completed(WatchedPass(TokenStatistics(logprobs, entropies), hidden), known, batch, ours)
