"""Several processes that hold the same model and the same batch, each computing on some of its prompts.

Numbers that are sums over sequences (token statistics laid out over the batch, inner products with one common direction) are
summed over processes; nothing else is sent. A sum of inner products with a direction that all processes share is the inner
product of the summed vector, so gradients themselves need not travel.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class WorkSharing:
    """group: a torch.distributed process group, or None for one process. Every member must make the same calls."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def mine(self, prompt_index: Tensor) -> Tensor:
        """Indices of the sequences whose prompts this process computes: every `size`-th prompt; all of them if alone."""
        if self.size == 1:
            return torch.arange(len(prompt_index), device=prompt_index.device)
        _, place = prompt_index.unique(return_inverse=True)
        return (place % self.size == self.rank).nonzero()[:, 0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes of a tensor of the same shape in each; the tensor itself if alone."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def any(self, condition: bool, device: torch.device) -> bool:
        """Whether `condition` holds in any process."""
        return bool(self.sum(torch.tensor(float(condition), device=device)) > 0)
