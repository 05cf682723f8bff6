"""What a trainer's model gets beside tokens: images, sounds, segments, and whatever else
log-probabilities depend on.

The probe's and the analysis' own passes give a model tokens alone. A model that is trained with
more would have other log-probabilities there (of placeholder tokens, for images), so that more is
refused by its name. Names are not enough to know it: a model's call is watched, and only arguments
known to be harmless pass. Where the call cannot be seen (a fused loss calls the model's inside)
every tensor of the batch must be one of those that GRPOTrainer is known to make from text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# What GRPOTrainer's batches hold for text, and DrGRPOTrainer's beside it.
TEXT_INPUTS = frozenset(
    {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "tool_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
        "ref_per_token_logps",
        "sampling_per_token_logps",
        "importance_sampling_ratio",
        "prompt_index",
        "sequence_weight",
    }
)
# Arguments of a causal language model's call that change no log-probability, or are the tokens
# themselves.
_TEXT_ARGUMENTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "labels",
        "logits_to_keep",
        "num_logits_to_keep",
        "num_items_in_batch",
        "cache_position",
        "use_cache",
        "return_dict",
        "output_router_logits",
        "output_hidden_states",
        "output_attentions",
        "fused_lm_head",
    }
)
# All zeros on a text: then they say what a model assumes without them.
_KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class ModelInputs:
    """Watches what `model` is called with between `begin` and `beyond_text`."""

    def __init__(self, model: nn.Module | None) -> None:
        self._calls = 0
        self._found: set[str] = set()
        self._watching = False
        if model is not None:
            model.register_forward_pre_hook(self._see, with_kwargs=True)

    def begin(self) -> None:
        """A micro-batch is about to run."""
        self._calls, self._found, self._watching = 0, set(), True

    def _see(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._watching:
            self._calls += 1
            self._found |= beyond_text(kwargs, _TEXT_ARGUMENTS)

    def beyond_text(self, inputs: dict[str, Any]) -> list[str]:
        """After a micro-batch with these inputs: names of what the model got beside its tokens,
        sorted.
        """
        self._watching = False
        return sorted(self._found if self._calls else beyond_text(inputs, TEXT_INPUTS))


def beyond_text(named: dict[str, Any], known: Iterable[str]) -> set[str]:
    """Names of tensors (or lists) that are not among the `known` ones and not harmless."""
    found = {name for name, value in named.items() if name not in known and _holds_something(value)}
    found = {name for name in found if not (name in _KINDS_OF_TOKENS and not bool(torch.as_tensor(named[name]).any()))}
    if "position_ids" in found and _counts_up(named["position_ids"], named.get("attention_mask")):
        found.discard("position_ids")
    return found


def _holds_something(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple | dict) and len(value) > 0)


def _counts_up(positions: Tensor, attended: Tensor | None) -> bool:
    """Whether (n, L) positions count each sequence's own tokens from 0, as the probe's passes do."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    if attended is None:
        return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())
    attended = attended.bool()
    return positions.shape == attended.shape and bool(((positions == attended.long().cumsum(1) - 1) | ~attended).all())


def refusal(names: Iterable[str], who: str) -> str:
    """One line on `names`, for the error of `who` ("the entropy probe")."""
    listed = ", ".join(names)
    return (
        f"the model gets {listed} beside its tokens, and {who} passes tokens alone: its log-probabilities would be those of "
        "another input; use prompts of text alone"
    )


def row_beyond_text(row: dict[str, Any]) -> str | None:
    """The column, or the kind of content, by which a task row holds more than text; None for text
    alone.
    """
    for name in _MEDIA:
        if row.get(name):
            return name
    prompt = row.get("prompt")
    for message in prompt if isinstance(prompt, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type", "text") != "text":
                return str(part["type"])
    return None
