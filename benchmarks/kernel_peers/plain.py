"""The floor: one forward and one backward pass over all sequences, LoRA gradients of the summed score, no kernel.

Length-sorted batches over both sides together; logits at completion tokens only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kernel_parts.cases import Case, Part, parts
from torch import Tensor
from torch.nn import functional

from entropy_core.batch import SequenceBatch

NEEDS = ("torch", "transformers", "peft")
ATTENTION = "sdpa"


def wrap(case: Case, cut: bool) -> Any:
    return case.model.get_base_model()


def kernel(handle: Any, case: Case) -> None:
    parameters = list(case.parameters.values())
    for part in parts(joined(case.rows, case.columns)):
        torch.autograd.grad(objective(handle, part), parameters)


def objective(handle: Any, part: Part) -> Tensor:
    hidden = handle.model(input_ids=part.input_ids, use_cache=False).last_hidden_state
    chosen = part.mask[:, 1:]
    logits = handle.lm_head(hidden[:, :-1][chosen])
    return functional.cross_entropy(logits, part.input_ids[:, 1:][chosen], reduction="sum")


def joined(first: SequenceBatch, second: SequenceBatch) -> SequenceBatch:
    """Both batches' sequences in one right-padded batch."""
    width = max(first.input_ids.shape[1], second.input_ids.shape[1])

    def both(name: str) -> Tensor:
        sides = [getattr(side, name) for side in (first, second)]
        return torch.cat([functional.pad(side, (0, width - side.shape[1])) for side in sides])

    masks = {name: both(name) for name in ("input_ids", "attention_mask", "completion_mask")}
    return replace(first, **masks, prompt_index=torch.cat([first.prompt_index, second.prompt_index]))
