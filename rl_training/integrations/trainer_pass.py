"""The pass before a step as the trainer made it: log-probabilities, entropies and hidden states of its loss's own forward pass.

A GRPOTrainer computes them for every completion in its loss at the weights before the step. Where they are those of the policy
(same tokens, temperature and mask; no dropout, no half precision), a second pass over the same sequences tells nothing new.
That is not assumed (known_pass).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.critic import PROJECTED, hidden_projection
from entropy_core.passes.hidden_states import noted_hidden_states, projected
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from entropy_core.watched_pass import WatchedPass
from rl_training.integrations.known_pass import KnownPass, Ours
from rl_training.sequences import RolloutSequence

_FORWARD = "_get_per_token_logps_and_entropies"
_TOKENS = ("input_ids", "attention_mask", "logits_to_keep")


class _Rows(NamedTuple):
    """One forward pass of the loss: (n, P + L) tokens and mask, (n, L) log-probabilities and entropies, (n, L, size) or None."""

    input_ids: Tensor
    attention_mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    hidden: Tensor | None


class TrainerPass:
    """Listens to a trainer's forward passes. `listening` says whether to keep what is heard; `clear` begins a step."""

    def __init__(self, trainer: Any, model: nn.Module, sharing: Processes) -> None:
        self._sharing = sharing
        self._rows: list[_Rows] = []
        self.listening = False
        forward: Callable[..., Any] | None = getattr(trainer, _FORWARD, None)
        self._deaf = None if forward is not None else "the trainer has no forward pass that could be listened to"
        self.forget()
        if forward is None:
            return

        def heard(*args: Any, **kwargs: Any) -> Any:
            if not (self.listening and self.known.trouble is None and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            with noted_hidden_states(model) as states:
                out = forward(*args, **kwargs)
            given = {**dict(zip(_TOKENS, args[1:4], strict=False)), **kwargs}
            self._note(given["input_ids"], given["attention_mask"], out, states)
            return out

        setattr(trainer, _FORWARD, heard)

    def forget(self) -> None:
        """Forget what is known of the trainer's passes: they are compared anew before they are used."""
        self.known = KnownPass("the trainer's")
        self.known.trouble = self._deaf

    def clear(self) -> None:
        """Forget the step's passes."""
        self._rows = []

    def _note(self, ids: Tensor, mask: Tensor, out: Any, states: list[Tensor]) -> None:
        logprobs, entropies = out[0], out[1]
        if entropies is None or not logprobs.requires_grad or logprobs.shape != entropies.shape:
            return
        length, hidden = logprobs.shape[1], None
        whole = torch.cat(states) if states and len({s.shape[1:] for s in states}) == 1 else None
        if whole is not None and whole.shape[:2] == ids.shape:
            before = whole[:, -length - 1 : -1]  # the state that predicts a token is the one before it
            hidden = projected(before, hidden_projection(whole.shape[2]))
        self._rows.append(_Rows(ids, mask.bool(), logprobs.detach(), entropies.detach(), hidden))

    # ------------------------------------------------------------------ what was heard
    def before(
        self,
        batch: SequenceBatch,
        sequences: list[RolloutSequence],
        ours: Ours,
    ) -> WatchedPass:
        """Numbers of `batch` before the step: the trainer's where it has them and they are right, else of passes of our own.

        Args:
            batch, sequences: the same sequences, in one order; equal in all processes.
            ours: makes a pass of our own, hidden states included.
        """
        heard, known = self._collected(batch, sequences)
        self._rows = []
        return self.known.completed(heard, known, batch, ours)

    def _collected(self, batch: SequenceBatch, sequences: list[RolloutSequence]) -> tuple[WatchedPass, Tensor]:
        """What any process has heard of each sequence, and (N,) bool whether one has."""
        shape, device = batch.input_ids.shape, batch.device
        logprobs, entropies = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        hidden = torch.zeros((*shape, PROJECTED), device=device)
        times, shown = torch.zeros(len(batch), dtype=torch.float64, device=device), True
        places = self._places() if self.known.trouble is None else {}
        for n, sequence in enumerate(sequences):
            place = places.get((sequence.prompt_ids, sequence.completion_ids))
            if place is None:
                continue
            rows, row = place
            start = len(sequence.prompt_ids)
            seen = rows.attention_mask[row, -rows.logprobs.shape[1] :]
            columns = slice(start, start + len(sequence.completion_ids))
            drawn = batch.completion_mask[n, columns]
            logprobs[n, columns] = torch.where(drawn, rows.logprobs[row][seen].to(logprobs), 0.0)
            entropies[n, columns] = torch.where(drawn, rows.entropies[row][seen].to(entropies), 0.0)
            shown = shown and rows.hidden is not None
            if rows.hidden is not None:
                hidden[n, columns] = torch.where(drawn[:, None], rows.hidden[row][seen].to(hidden), 0.0)
            times[n] = 1.0
        times = self._sharing.sum(times)
        each = times.clamp(min=1)[:, None]
        statistics = TokenStatistics(self._sharing.sum(logprobs) / each, self._sharing.sum(entropies) / each)
        hidden = self._sharing.sum(hidden) / each[..., None].to(hidden)
        unseen = self._sharing.any(not shown, device)
        return WatchedPass(statistics, None if unseen else hidden), times > 0

    def _places(self) -> dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[_Rows, int]]:
        """Prompt and completion tokens -> where they stand."""
        found = {}
        for rows in self._rows:
            cut = rows.input_ids.shape[1] - rows.logprobs.shape[1]
            for row, (ids, mask) in enumerate(zip(rows.input_ids, rows.attention_mask, strict=True)):
                prompt, completion = ids[:cut][mask[:cut]].tolist(), ids[cut:][mask[cut:]].tolist()
                found[(tuple(prompt), tuple(completion))] = (rows, row)
        return found
