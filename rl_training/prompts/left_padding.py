"""What padding on the left does to a model's logits, and how to undo it.

Trainers that pad prompts on the left pass an attention mask and no positions. A model with rotary
positions, or with positions counted from the mask, gives the same logits all the same; one that
counts positions from the left edge (GPT-2) scores another sequence than the one that was drawn,
since `generate` counts them from the mask; and a model that hardly heeds the mask (recurrent ones)
sees the padding whatever it is told. All of it shows on one sequence, alone against padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_core.passes.forward import evaluation_mode, innermost_model, input_device

_LONGEST, _PADDING = 12, 8

# Mean change of a logit, in standard deviations of the logits, that is taken for rounding. Wrong
# positions make 0.05 to 1.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_PRECISION = 3e-2


@dataclass(frozen=True)
class PaddingEffect:
    """What left padding does to a model's output.

    Attributes:
        kind: padding changes nothing; or it does until positions are passed; or it does whatever is
            passed.
        change: mean change of a logit behind padding without positions, in standard deviations of
            the logits.
    """

    kind: Literal["none", "positions", "always"]
    change: float = 0.0

    def sentence(self, model_name: str) -> str | None:
        """What it means for training, or None where padding changes nothing."""
        if self.kind == "none":
            return None
        return (
            f"positions: behind left padding {model_name} gives other logits ({self.change:.2g} of their standard deviation), "
            "and TRL passes no position_ids: where prompts of a batch are of unequal length, the trainer's log-probabilities and "
            "gradient are not those of the sequences drawn"
        )


def positions_matter(model: nn.Module, token_ids: Sequence[int], pad_token_id: int) -> PaddingEffect:
    """Two or three small forward passes in evaluation mode; random streams and the model are left
    as they were.

    Args:
        token_ids: any text of a few tokens, of which at most 12 are used.
    """
    table = getattr(getattr(innermost_model(model), "config", None), "max_position_embeddings", None)
    room = table if isinstance(table, int) and table > 2 else _LONGEST + _PADDING
    ids = list(token_ids)[: max(1, min(_LONGEST, room - 1))]
    padding = max(1, min(_PADDING, room - len(ids)))
    device, dtype = input_device(model), next(model.parameters()).dtype
    alone = torch.tensor([ids], device=device)
    padded = torch.tensor([[pad_token_id] * padding + ids], device=device)
    mask = (torch.arange(padded.shape[1], device=device) >= padding).long()[None]
    limit = _ROUNDING.get(dtype, _HALF_PRECISION)
    # Other lengths of padding may fall together with a period of the positions; one of 8 or less
    # does not.
    with torch.no_grad(), evaluation_mode(model):
        expected = _logits(model, alone, torch.ones_like(alone))[0]
        scale = expected.std().clamp(min=torch.finfo(expected.dtype).tiny)

        def change(**more: Tensor) -> float:
            found = _logits(model, padded, mask, **more)[0, padding:]
            return float((found - expected).abs().mean() / scale)

        without = change()
        if without <= limit:
            return PaddingEffect("none", without)
        if _takes_positions(model) and change(position_ids=positions_from_mask(mask)) <= limit:
            return PaddingEffect("positions", without)
    return PaddingEffect("always", without)


def positions_from_mask(mask: Tensor) -> Tensor:
    """(n, l) positions that count from the first token that is no padding; 0 on the padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def pass_positions(model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """From now on `model`, called with a two-dimensional attention mask and no positions, gets
    those of the mask.

    Args:
        model: what the trainer calls, adapters included, data-parallel wrappers not.
    """

    def add(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.dim() == 2 and kwargs.get("past_key_values") is None
        if plain and kwargs.get("position_ids") is None:
            kwargs = {**kwargs, "position_ids": positions_from_mask(mask)}
        return args, kwargs

    return model.register_forward_pre_hook(add, with_kwargs=True)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(inspect.unwrap(innermost_model(model).forward)).parameters


def _logits(model: nn.Module, ids: Tensor, mask: Tensor, **more: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, **more).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits[:, -ids.shape[1] :]  # prompt tuning adds positions in front
