"""Whether what a model makes of one sequence depends on how long the longest one of its batch is.

Rotary positions that are rescaled for long contexts (dynamic NTK, LongRoPE) take their frequencies
from the largest position in the batch: beyond a length, every sequence has other logits beside a
long one than alone, and other ones when it is scored than token by token when it was drawn. It
shows without a long sequence: one sequence, alone and beside another whose last token stands at a
large position.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entropy_core.passes.forward import evaluation_mode, innermost_model, input_device
from entropy_core.passes.position_table import longest_sequence

# Mean change of a logit, in standard deviations of the logits, that is taken for rounding.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_PRECISION = 3e-2
_SHORT = 8  # tokens: fewer than any context that is extended


class LongestSequence:
    """Watches a run's lengths for one model: a few tokens' passes whenever a batch is longer than
    all that was tried.

    Asked when training begins about the model's own context, which nearly every run stays within;
    see `finding`.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        self._model, self._tokens = model, list(token_ids)[:_SHORT]
        self._tried = 0
        context = _context(model)
        if context is not None and longest_dependence(model, self._tokens, context) == 0:
            self._tried = context

    def finding(self, length: int) -> str | None:
        """What is wrong in a batch whose sequences are `length` tokens long with their padding;
        None where nothing is.
        """
        if length <= self._tried:
            return None
        change = longest_dependence(self._model, self._tokens, length)
        if change == 0:
            self._tried = length
            return None
        return (
            f"logits of a sequence depend on the longest one of its batch: beside one of {length} tokens they change by "
            f"{change:.2g} of their standard deviation (position scaling of a long context, which depends on the batch). A "
            "completion is scored by another distribution than it was drawn from"
        )


def longest_dependence(model: nn.Module, token_ids: Sequence[int], length: int) -> float:
    """Mean change of a logit of one sequence, in standard deviations of the logits, beside one with
    a token at position `length` - 1; 0 within rounding, and for models that take no positions.

    The model is left as it was.
    """
    ids = list(token_ids)
    if "position_ids" not in inspect.signature(inspect.unwrap(innermost_model(model).forward)).parameters:
        return 0.0
    table = longest_sequence(model)
    last = min(length, table or length) - 1
    reach = 3 * min(last + 1, _context(model) or last + 1) // 4
    if len(ids) < 2 or reach < len(ids):
        return 0.0
    device = input_device(model)
    # Close together, inside any context that is extended; and as far apart as the model's own
    # context lets them, where small changes of the frequencies show.
    near = torch.arange(len(ids), device=device)
    apart = torch.linspace(0, reach - 1, len(ids), device=device).long()
    far = near.clone()
    far[-1] = last
    tokens = torch.tensor([ids], device=device)
    with torch.no_grad(), evaluation_mode(model):
        beside = _logits(model, torch.cat([tokens, tokens, tokens.flip(1)]), torch.stack([apart, near, far]))
        alone = torch.cat([_logits(model, tokens, positions[None]) for positions in (apart, near)])
    scale = alone.std().clamp(min=torch.finfo(alone.dtype).tiny)
    change = float(((beside[:2] - alone).abs().mean((1, 2)) / scale).max())
    limit = _ROUNDING.get(next(model.parameters()).dtype, _HALF_PRECISION)
    return 0.0 if change <= limit else change


def _context(model: nn.Module) -> int | None:
    found = getattr(getattr(innermost_model(model), "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits[:, -ids.shape[1] :]
