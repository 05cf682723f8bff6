"""The probe's numbers split by how completions ended, and the shares of a step also by the sign of their advantage.

    h_g = sum_{t in g} omega_t sum_k H_k / sum_{t in g} omega_t T_t        g: ended, truncated, environment
    (rl_training.prompts.endings)

Shares of groups add up to the shares of all. A group without sequences has no number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import normalized_weights
from rl_training.probe.observation import Observation
from rl_training.prompts.endings import ENDINGS, Ending, ending


def batch_endings(batch: SequenceBatch, eos_token_ids: Collection[int]) -> list[Ending]:
    """Of every sequence of a batch."""
    columns = torch.arange(batch.input_ids.shape[1], device=batch.device)
    last = (batch.attention_mask * columns).amax(1, keepdim=True)
    tokens, drawn = batch.input_ids.gather(1, last)[:, 0], batch.completion_mask.gather(1, last)[:, 0]
    return [ending([t], [d], eos_token_ids) for t, d in zip(tokens.tolist(), drawn.tolist(), strict=True)]


def sign_of(advantage: float) -> str:
    """positive, negative or zero."""
    return "positive" if advantage > 0 else "negative" if advantage < 0 else "zero"


def entropy_by_ending(seen: Observation, eos_token_ids: Collection[int]) -> dict[str, float]:
    """entropy_<ending>, nats per token, and <ending>_share, the weighted part of the sequences that ended so."""
    endings = batch_endings(seen.batch, eos_token_ids)
    weights = torch.ones(len(endings), dtype=torch.float64)
    if seen.log_weights is not None:
        weights = normalized_weights(seen.log_weights).cpu()
    sums, lengths = seen.statistics.entropy_sums().cpu(), seen.batch.completion_lengths.cpu().double()
    out: dict[str, float] = {}
    for kind in ENDINGS:
        members = torch.tensor([e == kind for e in endings])
        if bool(members.any()):
            own = weights * members
            out[f"entropy_{kind}"] = float((own * sums).sum() / (own * lengths).sum())
        if bool(members.any()) or kind != "environment":
            out[f"{kind}_share"] = float((weights * members).sum() / weights.sum())
    return out


def shares_by_group(shares: Tensor, endings: Sequence[Ending], advantages: Sequence[float]) -> dict[str, float]:
    """share_<ending> and share_<sign>: sums of the (N,) shares of the step's batch part, nats per token."""
    values = shares.double().cpu().tolist()
    out: dict[str, float] = {}
    for value, kind, advantage in zip(values, endings, advantages, strict=True):
        for name in (kind, sign_of(advantage)):
            out[f"share_{name}"] = out.get(f"share_{name}", 0.0) + value
    return out
