"""The sequences of a GRPOTrainer's step, as the entropy probe watches them.

`compute_loss` is where every micro-batch of every step passes with its tokens and advantages, whatever the loss, in every
process; it is wrapped, and nothing else of the trainer is touched. A trainer that rejects groups (DrGRPOTrainer) says in
`unfiltered_rollouts` what it generated before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rl_training.algs.rollout_sequences import RolloutSequence

# Losses that are sums of w_i S_i while the policy is the one that drew the sequences.
_LINEAR_LOSSES = ("dr_grpo", "grpo", "bnpo", "dapo")


class StepRollouts:
    """Collects what `trainer`, a GRPOTrainer, trains on; `take` hands over the step's sequences and begins anew.

    on_micro_batch is called with the inputs of each micro-batch before its forward pass.
    """

    def __init__(self, trainer: Any, on_micro_batch: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._trainer = trainer
        self._micro_batches: list[dict[str, Any]] = []
        original = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self._micro_batches.append(_tokens_and_advantages(inputs, trainer.args.max_completion_length))
                if on_micro_batch is not None:
                    on_micro_batch(inputs)
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def clear(self) -> None:
        self._micro_batches = []

    def take(self) -> tuple[list[RolloutSequence], list[RolloutSequence]]:
        """(generated, trained): the step's sequences before rejection and those in its loss, of all processes."""
        trained, self._micro_batches = self._trained(), []
        unfiltered = getattr(self._trainer, "unfiltered_rollouts", None)
        trained = gather_object(trained)
        generated = trained if unfiltered is None else gather_object(list(unfiltered))
        return generated, trained

    def _trained(self) -> list[RolloutSequence]:
        args, accumulated = self._trainer.args, len(self._micro_batches)
        out: list[RolloutSequence] = []
        tokens = sum(sum(m["lengths"]) for m in self._micro_batches)
        foreign = any(m["foreign"] for m in self._micro_batches)
        everywhere = gather_object([(tokens, foreign)])
        if any(foreign for _, foreign in everywhere):
            raise ValueError(
                "completions hold tokens that the policy did not draw (tool results): the probe cannot tell them"
            )
        tokens_everywhere = sum(tokens for tokens, _ in everywhere)
        processes = self._trainer.accelerator.num_processes
        linear = args.loss_type in _LINEAR_LOSSES and args.beta == 0.0
        for m in self._micro_batches:
            rows, its_tokens = len(m["lengths"]), sum(m["lengths"])
            for row, length in enumerate(m["lengths"]):
                per_token = {
                    "dr_grpo": rows * float(args.max_completion_length) * accumulated * processes,
                    "grpo": rows * length * accumulated * processes,
                    "bnpo": its_tokens * accumulated * processes,
                    "dapo": tokens_everywhere,
                }
                weight = math.nan
                if linear:  # a completion that the trainer masked out has no weight
                    weight = m["advantages"][row] / float(per_token[args.loss_type]) if length else 0.0
                out.append(
                    RolloutSequence(
                        tuple(m["prompt_ids"][row]),
                        tuple(m["completion_ids"][row]),
                        m["advantages"][row],
                        weight,
                        m["drawn_scores"][row],
                    )
                )
        return out


def prompts_of(inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    """The prompt's tokens of every sequence of a micro-batch."""
    return [tuple(ids) for ids in _unpadded(inputs["prompt_ids"], inputs["prompt_mask"].bool())]


def _tokens_and_advantages(inputs: dict[str, Any], longest: int) -> dict[str, Any]:
    """Lists, one entry a sequence; lengths: tokens in the loss. foreign: whether completions hold others than drawn tokens."""
    mask, old, tools = inputs["completion_mask"].bool(), inputs.get("old_per_token_logps"), inputs.get("tool_mask")
    lengths = mask.sum(1)
    advantages = inputs["advantages"].float()
    if advantages.dim() > 1:  # one for each token: what they have in common is their mean
        advantages = (advantages * mask).sum(1) / lengths.clamp(min=1)
    scores: list[float | None] = [None] * len(mask)
    if old is not None:
        values = (old.double() * mask).sum(1).tolist()
        scores = [value if length else None for value, length in zip(values, lengths.tolist(), strict=True)]
    return {
        "prompt_ids": _unpadded(inputs["prompt_ids"], inputs["prompt_mask"].bool()),
        "completion_ids": _unpadded(inputs["completion_ids"], _drawn(mask, longest)),
        "advantages": advantages.tolist(),
        "drawn_scores": scores,
        "lengths": lengths.tolist(),
        "foreign": tools is not None and bool((mask & ~tools.bool()).any()),
    }


def _drawn(mask: Tensor, longest: int) -> Tensor:
    """(n, L) bool, the tokens that were drawn: `mask`, but where it is empty (mask_truncated_completions) a whole completion,
    cut at `longest` tokens. Leaving those out would leave out the policy's long completions.
    """
    cut = torch.arange(mask.shape[1], device=mask.device) < longest
    return torch.where(mask.any(1, keepdim=True), mask, cut)


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
