"""A plain forward pass that keeps what the replay needs of each token, and its layout on the recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.critic import hidden_projection
from entropy_core.passes.forward import evaluation_mode, output_layer
from entropy_core.scores import TokenStatistics


def statistics_with_hidden(model: Any, batch: SequenceBatch) -> dict[str, Tensor]:
    """Token statistics and (N, L, 64) projected hidden states from one plain pass.

    (N, L) of each: logprob, entropy, variance Var[log pi], collision sum pi^2, sharpness sum pi^2 (log pi + H).
    """
    found: dict[str, list[Tensor]] = {}
    places = []
    caught: list[Tensor] = []
    hook = output_layer(model).register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad(), evaluation_mode(model):
            for bucket in length_buckets(batch, 1024):
                caught.clear()
                logits = model(input_ids=bucket.input_ids).logits[bucket.rows, bucket.positions].double()
                hidden = caught[-1][bucket.rows, bucket.positions].float()
                law = torch.log_softmax(logits / batch.temperature, -1)
                p = law.exp()
                entropy = -(p * law).sum(-1)
                values = {
                    "logprob": law.gather(1, bucket.targets[:, None])[:, 0],
                    "entropy": entropy,
                    "collision": p.square().sum(-1),
                    "sharpness": (p.square() * (law + entropy[:, None])).sum(-1),
                    "variance": (p * (law + entropy[:, None]).square()).sum(-1),
                    "projected": hidden @ hidden_projection(hidden.shape[1]),
                }
                for name, value in values.items():
                    found.setdefault(name, []).append(value)
                places.append((bucket.sequences, bucket.columns))
    finally:
        hook.remove()
    at = torch.cat([rows for rows, _ in places]), torch.cat([columns for _, columns in places])
    out = {}
    for name, parts in found.items():
        joined = torch.cat(parts)
        full = torch.zeros((*batch.input_ids.shape, *joined.shape[1:]), dtype=joined.dtype)
        full[at] = joined
        out[name] = full
    return out


def completions_from_the_left(batch: SequenceBatch, values: Tensor, longest: int) -> np.ndarray:
    """(N, L, ...) in the batch's layout -> (N, longest, ...) float32, completions from the left, 0 behind their ends."""
    out = torch.zeros((len(batch), longest, *values.shape[2:]), dtype=torch.float32)
    rows, columns = batch.completion_mask.nonzero(as_tuple=True)
    out[rows, (batch.completion_mask.cumsum(1) - 1)[rows, columns]] = values[rows, columns].float()
    return out.numpy()


def stacked(parts: Sequence[TokenStatistics]) -> dict[str, Tensor]:
    """(N, L, parts) of log pi and of H."""
    return {
        "logprob_along": torch.stack([p.logprobs.float() for p in parts], -1),
        "entropy_along": torch.stack([p.entropies.float() for p in parts], -1),
    }
