"""Rewards that float32 can compute with, and runs in which none of them ever made a gradient.

TRL keeps rewards, advantages and losses in float32. A reward of 1e308 is infinite there, its
group's advantages are 0 or NaN, and training stands still without a word; from 1e19 on already the
squares in a gradient's norm overflow, and clipping sets the gradient to 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rl_training.errors import UserError

LARGEST_REWARD = 1e15


# From here on squares overflow, and with them the standard deviation that TRL divides by.
_LARGEST_SQUARED = 1e18


def check_rewards(rewards: Tensor, names: Sequence[str], weights: Tensor, largest: float = LARGEST_REWARD) -> None:
    """Refuse rewards that float32 cannot hold.

    Args:
        rewards: (n, functions) float32 as the trainer has them, NaN where a function gave none.
        weights: (functions,).

    Raises:
        UserError: a reward, or a weighted sum of rewards, that is infinite or beyond `largest`.
    """
    weighted = rewards * weights.to(rewards)
    for values, what in (
        (rewards, None),
        (weighted, None),
        (weighted.nansum(1, keepdim=True), "the weighted sum of rewards"),
    ):
        beyond = (values.abs() > largest).nonzero()
        if len(beyond):
            row, function = beyond[0].tolist()
            found = what or f"reward function {names[function]!r}"
            raise UserError(
                f"{found} gave {float(values[row, function]):g} (in float32) for completion {row} of the step: advantages and "
                f"gradients cannot be computed beyond {largest:g}; scale or clip the rewards"
            )


def without_weight(weights: Tensor, groups: int) -> list[bool]:
    """For each of the groups in a row whether all its (n,) weights are 0.

    Raises:
        UserError: one is not finite.
    """
    if not bool(torch.isfinite(weights).all()):
        raise UserError(
            "a sequence's weight in the loss is not finite: its group's rewards lie too far apart; scale them"
        )
    return (~weights.view(groups, -1).any(1)).tolist() if groups else []


def watch_rewards(trainer: Any, tell: Callable[[str], None]) -> None:
    """Hand `tell` a sentence for rewards of a trainer of TRL's that float32 cannot compute with;
    training goes on.
    """
    calculate = getattr(trainer, "_calculate_rewards", None)
    if calculate is None:
        return

    def watching(*args: Any, **kwargs: Any) -> Any:
        rewards = calculate(*args, **kwargs)
        try:
            check_rewards(rewards, trainer.reward_func_names, trainer.reward_weights, _LARGEST_SQUARED)
        except UserError as error:
            tell(f"{error}. Advantages of such a group are 0 or NaN: it trains nothing, or ruins the policy")
        return rewards

    trainer._calculate_rewards = watching


class TrainedAtAll(TrainerCallback):
    """Says at the end of a run that no step of it had a gradient."""

    def __init__(self) -> None:
        self._trained = self._steps = 0

    def note(self, trained: int) -> None:
        """Take in one step's count.

        Args:
            trained: sequences with weight in the step that begins, of all processes.
        """
        self._steps, self._trained = self._steps + 1, self._trained + trained

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps and not self._trained and state.is_world_process_zero:
            warnings.warn(
                f"nothing was trained: in {self._steps} steps no sequence had weight in the loss, because the rewards of every "
                "prompt's completions were equal (as float32 holds them), or missing (None or NaN); take an easier or harder "
                "task, more completions of a prompt, or a reward that tells completions apart",
                RuntimeWarning,
                stacklevel=2,
            )
