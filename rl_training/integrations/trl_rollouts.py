"""The sequences of a GRPOTrainer's step, as the entropy probe watches them.

`compute_loss` is where every micro-batch of every step passes with its tokens and advantages,
whatever the loss, in every process; it is wrapped, and nothing else of the trainer is touched. A
trainer that rejects groups (DrGRPOTrainer) says in `unfiltered_rollouts` what it generated before
that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from entropy_core.processes import Processes
from rl_training.generation.drawn_tokens import GeneratedMasks, drawn_completions, loss_mask
from rl_training.generation.model_inputs import ModelInputs, refusal
from rl_training.premises.loss_reading import LossReader
from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.sequences import RolloutSequence

# Losses that are sums of w_i S_i while the policy is the one that drew the sequences.
_LINEAR_LOSSES = ("dr_grpo", "grpo", "bnpo", "dapo")


class StepRollouts:
    """Collects what `trainer`, a GRPOTrainer, trains on; `take` hands over the step's sequences and
    begins anew.

    on_micro_batch is called with the inputs of each micro-batch before its forward pass. sharing: the
    processes that train; by default all of the launch.
    """

    def __init__(
        self,
        trainer: Any,
        on_micro_batch: Callable[[dict[str, Any]], None] | None = None,
        sharing: Processes | None = None,
    ) -> None:
        self._trainer, self._sharing = trainer, sharing or Processes.world()
        self._micro_batches: list[dict[str, Any]] = []
        self._generation: Tensor | None = None
        self._masks, self._beyond_text = GeneratedMasks(trainer), set[str]()
        tokenizer = text_tokenizer(getattr(trainer, "processing_class", None))
        self._pad_token_id: int | None = getattr(tokenizer, "pad_token_id", None)
        model = getattr(trainer, "model", None)
        watch = ModelInputs(None if model is None else trainer.accelerator.unwrap_model(model))
        self._reader = LossReader.of(trainer)
        original = trainer.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model.training:
                # Read before the forward pass and turned into sequences after the step, so that
                # training goes on undisturbed.
                self._micro_batches.append(dict(inputs))
                if on_micro_batch is not None:
                    on_micro_batch(inputs)
                watch.begin()
            loss = original(model, inputs, *args, **kwargs)
            if model.training:
                self._beyond_text.update(watch.beyond_text(inputs))
            return loss

        trainer.compute_loss = compute_loss

    def clear(self) -> None:
        self._micro_batches, self._beyond_text = [], set()

    def take(self) -> tuple[list[RolloutSequence], list[RolloutSequence]]:
        """(generated, trained): the step's sequences before rejection and those in its loss, of all
        processes.

        Sequences in which the policy drew nothing are left out.

        Raises:
            ValueError: the model got more than tokens, or where it is not known which tokens were
                drawn, in all processes alike.
        """
        trouble, trained = None, []
        try:
            if self._beyond_text:
                raise ValueError(refusal(sorted(self._beyond_text), "the entropy probe"))
            read = [self._read(inputs) for inputs in self._micro_batches]
        except ValueError as error:
            trouble, read = str(error), []
        self.clear()
        everywhere = self._sharing.gather([(trouble, sum(sum(m["lengths"]) for m in read))])
        if troubles := [found for found, _ in everywhere if found is not None]:
            raise ValueError(troubles[0])
        trained = self._sharing.gather(self._trained(read, sum(tokens for _, tokens in everywhere)))
        unfiltered = getattr(self._trainer, "unfiltered_rollouts", None)
        generated = trained if unfiltered is None else self._sharing.gather(unfiltered)
        return generated, trained

    def new_generation(self, read: bool) -> list[list[RolloutSequence]] | None:
        """All sequences of the trainer's generation, by micro-batch of this process (gathered over
        processes), where it was made since the last call (none of them if not `read`); None
        otherwise, and where the trainer keeps none in TRL's place.
        """
        kept = getattr(self._trainer, "_buffered_inputs", None)
        if not isinstance(kept, list) or not kept or not isinstance(kept[0], dict):
            return None
        newest = kept[0].get("completion_ids")
        if newest is None or newest is self._generation:
            return None
        self._generation = newest  # held, so that no later one can be taken for it
        micro_batches = [self._read(inputs) for inputs in kept] if read else []
        return [self._sharing.gather(self._trained([m], sum(m["lengths"]))) for m in micro_batches]

    def _read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        longest = self._trainer.args.max_completion_length
        completions = drawn_completions(inputs, longest, self._pad_token_id, self._masks)
        return {**_tokens_and_advantages(inputs), "completions": completions}

    def _trained(self, micro_batches: list[dict[str, Any]], tokens_everywhere: int) -> list[RolloutSequence]:
        args, accumulated = self._trainer.args, len(micro_batches)
        out: list[RolloutSequence] = []
        processes = self._trainer.accelerator.num_processes
        loss_type = getattr(args, "loss_type", None)  # RLOOTrainer's loss has no name, and ratios of whole sequences
        linear = loss_type in _LINEAR_LOSSES and args.beta == 0.0
        for m, loss_weights in zip(micro_batches, self._token_weights(accumulated), strict=True):
            rows, its_tokens = len(m["lengths"]), sum(m["lengths"])
            for row, length in enumerate(m["lengths"]):
                completion = m["completions"][row]
                if not completion.ids or (completion.drawn is not None and not any(completion.drawn)):
                    continue
                per_token = {
                    "dr_grpo": rows * float(args.max_completion_length) * accumulated * processes,
                    "grpo": rows * length * accumulated * processes,
                    "bnpo": its_tokens * accumulated * processes,
                    "dapo": tokens_everywhere,
                }
                weight = math.nan
                if linear:  # a completion that the trainer masked out has no weight
                    weight = m["advantages"][row] / float(per_token[loss_type]) if length else 0.0
                out.append(
                    RolloutSequence(
                        tuple(m["prompt_ids"][row]),
                        tuple(completion.ids),
                        m["advantages"][row],
                        weight,
                        m["drawn_scores"][row],
                        drawn=completion.drawn,
                        token_weights=None
                        if loss_weights is None
                        else tuple(loss_weights[row][: len(completion.ids)].tolist()),
                    )
                )
        return out

    def _token_weights(self, micro_batches: int) -> list[Tensor | None]:
        """(n, L) of each of the step's micro-batches, None where they could not be read off the
        loss.
        """
        found = [] if self._reader is None else self._reader.token_weights()
        return found if len(found) == micro_batches else [None] * micro_batches


def prompts_of(inputs: dict[str, Any]) -> list[tuple[int, ...]]:
    """The prompt's tokens of every sequence of a micro-batch."""
    return [tuple(ids) for ids in _unpadded(inputs["prompt_ids"], inputs["prompt_mask"].bool())]


def _tokens_and_advantages(inputs: dict[str, Any]) -> dict[str, Any]:
    """Lists, one entry a sequence; lengths: tokens in the loss."""
    mask, old = loss_mask(inputs), inputs.get("old_per_token_logps")
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
        "advantages": advantages.tolist(),
        "drawn_scores": scores,
        "lengths": lengths.tolist(),
    }


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
