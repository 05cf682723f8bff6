"""A causal language model of one attention layer, torch only: small enough for float64, and for processes that start often."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class DistanceAttention(nn.Module):
    """One layer of causal attention that honours any mask and favours near tokens, as ALiBi does.

    Distances are counted in the row, as most implementations do, or between position ids.
    """

    def __init__(self, vocabulary: int, slope: float = 0.0, by_position_ids: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, vocabulary)
        self.slope, self.by_position_ids = slope, by_position_ids
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> SimpleNamespace:
        hidden, length = self.embedding(input_ids), input_ids.shape[1]
        places = torch.arange(length).expand(input_ids.shape)
        if self.by_position_ids and position_ids is not None:
            places = position_ids
        distance = (places[:, :, None] - places[:, None, :]).to(hidden.dtype)
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) - self.slope * distance
        if attention_mask is None:
            scores = scores.masked_fill(torch.arange(length) > torch.arange(length)[:, None], -1e9)
        else:
            scores = scores + attention_mask[:, 0]
        return SimpleNamespace(logits=self.head(scores.softmax(-1) @ hidden))
