"""Whether a model's prompts pass through it once for all their completions: found out on the batches that it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from entropy_core.batch import Bucket, SequenceBatch, length_buckets
from entropy_core.passes.shared_prefix import shared_prefix_buckets, shares_prefixes, tells_of_sharing
from entropy_core.processes import ALONE, Processes

Buckets = Callable[[SequenceBatch], list[Bucket]]
"""How the rows of a batch are laid out."""


class PrefixSharing:
    """One model's answer, kept from batch to batch; asked anew for longer sequences. All processes come to the same one."""

    def __init__(self, model: nn.Module, sharing: Processes = ALONE) -> None:
        self._model, self._sharing = model, sharing
        self._shares: bool | None = None
        self._longest_tried = 0

    def state(self) -> list[Any]:
        """For `load`: rows of another layout round otherwise."""
        return [self._shares, self._longest_tried]

    def load(self, state: Any) -> None:
        """Go on from `state`. Raises ValueError."""
        match state:
            case [None | bool() as shares, int() as longest] if not isinstance(longest, bool):
                self._shares, self._longest_tried = shares, longest
            case _:
                raise ValueError("how its rows are laid out is not recorded")

    def buckets(self, batch: SequenceBatch) -> Buckets:
        """How the rows of a batch are to be laid out."""
        return shared_prefix_buckets if self.shares(batch) else length_buckets

    def shares(self, batch: SequenceBatch) -> bool:
        """Whether rows of this batch hold all completions of a prompt."""
        longest = int(batch.scored_lengths.max())
        untried = self._shares is not False and longest > self._longest_tried
        if untried and tells_of_sharing(batch):
            self._longest_tried = longest
            ours = shares_prefixes(self._model, batch)
            self._shares = not self._sharing.any(not ours, batch.device)
        return bool(self._shares) and longest <= self._longest_tried
