"""Token statistics of a batch, the passes shared by the processes of a launch."""

from __future__ import annotations

import torch
from torch import nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics, token_statistics


def shared_statistics(
    model: nn.Module, batch: SequenceBatch, passes: PassSettings, with_variances: bool, processes: Processes
) -> TokenStatistics:
    """`token_statistics` of a batch, each process taking some of its length buckets: the same bits with any number."""
    if processes.size == 1:
        return token_statistics(model, batch, passes, with_variances, all_digits=True)
    full = [torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=batch.device) for _ in range(3)]
    buckets = length_buckets(batch, passes.token_batch_size)
    for number in processes.mine(range(len(buckets))):
        rows = buckets[number].indices
        found = token_statistics(model, batch.select(rows), passes, with_variances, all_digits=True)
        for whole, own in zip(full, (found.logprobs, found.entropies, found.surprisal_variances), strict=True):
            if own is not None:
                whole[rows] = own.double()
    logprobs, entropies, variances = (processes.sum(whole) for whole in full)
    return TokenStatistics(logprobs, entropies, variances if with_variances else None)
