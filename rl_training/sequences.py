"""The record of one sequence: everything that is known of it between the sampler and a row of the
results.

Collections (rl_training.sampling.Rollouts), batches (entropy_core.batch.SequenceBatch) and files
are made from it, so that texts, rewards and weights never travel apart from their tokens. No tensor
library is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class RolloutSequence:
    """One prompt with one completion, and where it came from. What is not known has its default.

    Attributes:
        prompt_ids, completion_ids: tokens.
        advantage, weight: A_i and w_i in the loss (entropy_core.weighting); NaN where unknown.
        drawn_score: log-probability (nats) of the completion under the policy that drew it; None
            where that is today's.
        draw_probability: with which its prompt was drawn from the task.
        drawn: which tokens of the completion the policy drew (the others came from tools or an
            environment); None: every one.
        token_weights: w_ik of each of its completion's tokens, as the loss gave them; None where
            they were not read.
        sampler_logprobs: of each of its completion's tokens, nats, as the sampler recorded them;
            None where it did not.
        prompt_index: number of the prompt in its task; None where it has none.
        prompt, completion: texts as a reader is shown them.
        prompt_row: the task's row that the prompt came from.
        reward: None where nothing judged the completion.
        status: "evaluation", or in a training buffer "trained", "filler" (kept without gradient,
            because refilling ran out) or "rejected".
        step, round, rank: optimizer step (from 1), round of generation within it, and the process
            that generated it.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float = math.nan
    weight: float = math.nan
    drawn_score: float | None = None
    draw_probability: float = 1.0
    drawn: tuple[bool, ...] | None = None
    token_weights: tuple[float, ...] | None = None
    sampler_logprobs: tuple[float | None, ...] | None = None
    prompt_index: int | None = None
    prompt: str = ""
    completion: str = ""
    prompt_row: dict[str, Any] | None = None
    reward: float | None = None
    status: str = ""
    step: int = 0
    round: int = 0
    rank: int = 0

    @property
    def length(self) -> int:
        """T: tokens of the completion that the policy drew."""
        return len(self.completion_ids) if self.drawn is None else sum(self.drawn)

    @property
    def log_prior(self) -> float:
        """Minus the log of the probability with which its prompt was drawn."""
        return -math.log(self.draw_probability)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON takes them: null in place of NaN.

        Rows of a user's own task may hold what JSON does not know.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RolloutSequence:
        """What `to_json` gave. Raises TypeError where fields are missing or unknown."""
        read = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        for name in ("advantage", "weight"):
            if read.get(name) is None:
                read[name] = math.nan
        return cls(**read)
