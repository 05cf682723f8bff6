"""One forward pass over a batch: log-probabilities, entropies and, for the critic, projected hidden
states.

Nothing of the vocabulary's size is kept, and no gradient. Several processes share the sequences;
where the model's own weights are spread over processes (FSDP, ZeRO-3) every forward is a collective
operation, and all make equally many (`lockstep`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket, SequenceBatch
from entropy_core.critic import PROJECTED, hidden_projection
from entropy_core.passes.forward import evaluation_mode
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.hidden_states import noted_hidden_states, projected
from entropy_core.processes import ALONE, Processes
from entropy_core.scores import TokenStatistics


@dataclass(frozen=True)
class WatchedPass:
    """
    Attributes:
    statistics: of every drawn token, as `entropy_core.scores.token_statistics` gives them.
    hidden: (N, L, PROJECTED) float32 projected hidden states, 0 off drawn tokens; None where the
        model shows none.
    """

    statistics: TokenStatistics
    hidden: Tensor | None


def watched_pass(
    model: nn.Module,
    batch: SequenceBatch,
    buckets: Callable[[SequenceBatch], list[Bucket]],
    processes: Processes = ALONE,
    lockstep: bool = False,
    with_hidden: bool = True,
    with_variances: bool = False,
) -> WatchedPass:
    """Pass a batch through the model once, in evaluation mode.

    Args:
        buckets: how rows are laid out (length_buckets, or shared_prefix_buckets).
        processes: processes that are given the same batch; each computes some of its prompts.
        lockstep: whether every process must call the model equally often.
        with_hidden: whether hidden states are wanted.
        with_variances: whether the statistics are to hold `surprisal_variances`.

    Returns:
        Numbers of the whole batch, in every process.

    Raises:
        ValueError: logits that are not finite, naming the sequence; in every process, once all have made their passes.
    """
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    shape, device = batch.input_ids.shape, batch.device
    logprobs = torch.zeros(shape, dtype=dtype, device=device)
    entropies = torch.zeros(shape, dtype=torch.float64, device=device)
    variances = torch.zeros(shape, dtype=dtype, device=device) if with_variances else None
    hidden = torch.zeros((*shape, PROJECTED), device=device) if with_hidden else None
    unseen = False
    trouble: ValueError | None = None
    with evaluation_mode(model), torch.no_grad():
        for bucket, counts in _rounds(batch, buckets, processes, lockstep):
            try:
                with noted_hidden_states(model) as states:
                    found = completion_values(model, bucket, batch.temperature, with_variances=with_variances)
            except ValueError as error:
                trouble = trouble or error
                continue
            if not counts:
                continue
            assert found.entropies is not None
            at = (bucket.sequences, bucket.columns)
            logprobs[at], entropies[at] = found.logprobs.to(logprobs), found.entropies.to(entropies)
            if variances is not None and found.variances is not None:
                variances[at] = found.variances.to(variances)
            if hidden is None:
                continue
            if not states or states[-1].shape[:2] != bucket.input_ids.shape:
                unseen = True
                continue
            state = states[-1]
            rows = state[bucket.rows.to(state.device), bucket.positions.to(state.device)]
            hidden[at] = projected(rows, hidden_projection(rows.shape[1])).to(device)
    if processes.any(trouble is not None, device):
        raise trouble or ValueError("another process cannot score its sequences, and its own output says why")
    if hidden is not None and processes.any(unseen, device):
        hidden = None
    sums = [processes.sum(values) for values in (logprobs, entropies, variances) if values is not None]
    statistics = TokenStatistics(*sums)
    return WatchedPass(statistics, None if hidden is None else processes.sum(hidden))


def _rounds(
    batch: SequenceBatch, buckets: Callable[[SequenceBatch], list[Bucket]], processes: Processes, lockstep: bool
) -> list[tuple[Bucket, bool]]:
    """This process's buckets, with places of the whole batch, and whether each counts: under
    lockstep a process with fewer than another passes one of them again for nothing.
    """
    mine = processes.my_sequences(batch.prompt_index)
    # Without a prompt of its own a process passes the first sequence, uncounted, to keep in step.
    chosen = mine if len(mine) else torch.zeros(1, dtype=torch.long, device=batch.device)
    pieces = [
        replace(piece, indices=chosen[piece.indices], sequences=chosen[piece.sequences])
        for piece in (buckets(batch.select(chosen)) if len(mine) or lockstep else [])
    ]
    rounds = [(piece, bool(len(mine))) for piece in pieces]
    if lockstep:
        place = 0
        # A sharded model's call is collective: who has finished repeats its last piece, uncounted.
        while processes.any(place < len(pieces), batch.device):
            if place >= len(rounds):
                rounds.append((pieces[-1], False))
            place += 1
    return rounds
