"""A plain forward pass that keeps what the replay needs of each token, and the layout of tokens on the recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.critic import hidden_projection
from entropy_core.passes.forward import evaluation_mode, innermost_model, output_layer
from entropy_core.scores import TokenStatistics

_WORTH_SHARING = 16  # tokens of a common beginning
_TOKENS_AT_ONCE = 256  # whose logits are held


def statistics_with_hidden(model: Any, batch: SequenceBatch) -> dict[str, Tensor]:
    """Token statistics and (N, L, 64) projected hidden states of a causal language model that has its decoder in `.model`.

    (N, L) of each: logprob, entropy, variance Var[log pi], collision sum pi^2, sharpness sum pi^2 (log pi + H).
    """
    layer, found, places = output_layer(model), list[dict[str, Tensor]](), []
    assert layer is not None
    with torch.no_grad(), evaluation_mode(model):
        for bucket in length_buckets(batch, 2048):
            hidden = _hidden_states(model, bucket.input_ids)[bucket.rows, bucket.positions]
            for some in torch.arange(len(hidden)).split(_TOKENS_AT_ONCE):
                sampling_config = torch.log_softmax(layer(hidden[some]).double() / batch.temperature, -1)
                p, drawn = sampling_config.exp(), bucket.targets[some]
                entropy = -(p * sampling_config).sum(-1)
                found.append(
                    {
                        "logprob": sampling_config.gather(1, drawn[:, None])[:, 0],
                        "entropy": entropy,
                        "collision": p.square().sum(-1),
                        "sharpness": (p.square() * (sampling_config + entropy[:, None])).sum(-1),
                        "variance": (p * (sampling_config + entropy[:, None]).square()).sum(-1),
                        "projected": hidden[some].float() @ hidden_projection(hidden.shape[1]),
                    }
                )
            places.append((bucket.sequences, bucket.columns))
    at = torch.cat([rows for rows, _ in places]), torch.cat([columns for _, columns in places])
    out = {}
    for name in found[0]:
        joined = torch.cat([part[name] for part in found])
        full = torch.zeros((*batch.input_ids.shape, *joined.shape[1:]), dtype=joined.dtype)
        full[at] = joined
        out[name] = full
    return out


def _hidden_states(model: Any, ids: Tensor) -> Tensor:
    """(n, l, width) of right-padded rows; a beginning that all of them have in common passes once."""
    decoder: Any = innermost_model(model).model
    common = min(int((ids == ids[0]).all(0).long().cumprod(0).sum()), ids.shape[1] - 1)
    if common < _WORTH_SHARING or len(ids) == 1:
        return decoder(input_ids=ids).last_hidden_state
    first = decoder(input_ids=ids[:1, :common], use_cache=True)
    first.past_key_values.batch_repeat_interleave(len(ids))
    rest = decoder(input_ids=ids[:, common:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.last_hidden_state.expand(len(ids), -1, -1), rest.last_hidden_state], 1)


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
