"""Which tokens of a GRPOTrainer's completions the policy drew, and which came from tools or an
environment.

    completion_mask     1 on the whole completion, foreign tokens included; all 0 where mask_truncated_completions left it out
    tool_mask           1 on drawn tokens, 0 on results of tools; absent where there are none. A rollout function returns the
                        same under the name env_mask, which TRL renames

Both are masked out of completions that were cut, although the policy drew those as well: leaving
them out would leave out its long completions. Their tokens are what stands before the padding, and
which of these were drawn is remembered from generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

# Attributes of a GRPOTrainer by which something else than the policy writes into completions, and
# the arguments they come from.
_ENVIRONMENTS = {"tools": "tools", "environment_factories": "environment_factory", "rollout_func": "rollout_func"}


class DrawnCompletion(NamedTuple):
    """A completion's tokens, and which of them the policy drew: None where it drew every one."""

    ids: list[int]
    drawn: tuple[bool, ...] | None


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(n, L) bool of a micro-batch: the tokens in the loss."""
    mask = inputs["completion_mask"].bool()
    return mask if (tools := inputs.get("tool_mask")) is None else mask & tools.bool()


def drawn_masks(generated: Any) -> list[list[bool]] | None:
    """For each completion of one generation which of its tokens the policy drew; None where it drew every one.

    Args:
        generated: what a trainer's `_generate` returned: (prompts, completions, masks or None, ...), lists with one entry a
            sequence. Trainers that have no masks (RLOOTrainer) return texts or messages in their place.
    """
    if not isinstance(generated, tuple) or len(generated) < 3 or generated[2] is None:
        return None
    completions, masks = generated[1:3]
    found = [[bool(m) for m in mask] for mask in masks if not isinstance(mask, str) and not _of_messages(mask)]
    same = len(found) == len(completions) and all(len(m) == len(c) for m, c in zip(found, completions, strict=True))
    return found if same else None


def _of_messages(entry: Any) -> bool:
    return isinstance(entry, list) and any(isinstance(part, dict) for part in entry)


class GeneratedMasks:
    """Remembers which tokens of the newest generation were drawn, where the trainer is going to
    mask that out.
    """

    def __init__(self, trainer: Any) -> None:
        self._drawn: dict[tuple[int, ...], tuple[bool, ...] | None] = {}
        generate = getattr(trainer, "_generate", None)
        if generate is None or not getattr(trainer.args, "mask_truncated_completions", False):
            return

        def remembering(*args: Any, **kwargs: Any) -> Any:
            found = generate(*args, **kwargs)
            self._remember(found)
            return found

        trainer._generate = remembering

    def _remember(self, generated: Any) -> None:
        """Keep the masks of one generation.

        Args:
            generated: (prompts, completions, masks or None, ...), lists with one entry a sequence.
        """
        masks = drawn_masks(generated)
        if masks is None:
            return
        self._drawn = {}
        for ids, mask in zip(generated[1], masks, strict=True):
            drawn = tuple(mask)
            # Equal tokens with unequal masks: which one a masked completion is cannot be told.
            same = self._drawn.setdefault(tuple(ids), drawn) == drawn
            self._drawn[tuple(ids)] = drawn if same else None

    def of(self, ids: Sequence[int]) -> tuple[bool, ...]:
        """Of a masked completion. Raises ValueError where it is not known."""
        drawn = self._drawn.get(tuple(ids))
        if drawn is None:
            raise ValueError(
                "a completion was cut and masked out of the loss, and which of its tokens the policy drew is not known (tool "
                "results look like any other): set mask_truncated_completions=False"
            )
        return drawn


def completion_of_row(inputs: dict[str, Any], row: int) -> DrawnCompletion:
    """One completion that is not masked out."""
    mask, tools = inputs["completion_mask"][row].bool(), inputs.get("tool_mask")
    drawn = None if tools is None else tuple(tools[row][mask].bool().tolist())
    return DrawnCompletion(inputs["completion_ids"][row][mask].tolist(), None if drawn is None or all(drawn) else drawn)


def drawn_completions(
    inputs: dict[str, Any], longest: int, pad_token_id: int | None, masks: GeneratedMasks
) -> list[DrawnCompletion]:
    """Every completion of a micro-batch, those that were masked out included.

    Args:
        longest: tokens at which a masked completion is cut where there is no padding token to know
            its end by.
    """
    out = []
    tools = inputs.get("tool_mask")
    for row, (ids, mask) in enumerate(zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)):
        if bool(mask.any()):
            out.append(completion_of_row(inputs, row))
            continue
        whole = ids[:longest].tolist() if pad_token_id is None else _before_padding(ids, pad_token_id)
        drawn = None if tools is None else masks.of(whole)
        out.append(DrawnCompletion(whole, None if drawn is None or all(drawn) else drawn))
    return out


def _before_padding(ids: Tensor, pad_token_id: int) -> list[int]:
    """A completion that was cut never ends with the padding token: the trainer takes that for an
    end.
    """
    kept = (ids != pad_token_id).nonzero()
    return ids[: int(kept.max()) + 1].tolist() if len(kept) else []


def environment_of(trainer: Any) -> str | None:
    """The argument by which the trainer lets tools or an environment write into completions, or
    None.
    """
    return next((argument for name, argument in _ENVIRONMENTS.items() if getattr(trainer, name, None)), None)
