"""Calling reward functions outside a trainer as TRL's trainer calls them: with keywords, sync or
async, None for "not judged".
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rl_training.errors import UserError


class NoTrainerState:
    """Stands in for `trainer_state` where no run is known: false, and without attributes.

    Raises:
        UserError: an attribute is read.
    """

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(
            f"a reward function asks for trainer_state.{name}, but the checkpoint has no trainer_state.json that says it: "
            "restore the file, or give checkpoint.task with a reward that does not depend on the course of training"
        )


def total_rewards(
    reward_functions: Sequence[Callable[..., Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    columns: dict[str, list[Any]],
    trainer_state: Any = None,
) -> list[float | None]:
    """The sum over the functions that judge a completion; None for a completion that no function
    judges, as in TRL.

    Args:
        trainer_state: transformers' TrainerState as the functions are to see it. What they log is
            dropped.

    Raises:
        UserError: a function returns another number of rewards than there are completions, a reward
            that is not finite, or calls exit().
    """
    totals: list[float | None] = [None] * len(completions)
    for function in reward_functions:
        name = getattr(function, "__name__", type(function).__name__)
        try:
            values = _finished(
                function(
                    prompts=list(prompts),
                    completions=list(completions),
                    completion_ids=list(completion_ids),
                    **columns,
                    trainer_state=NoTrainerState() if trainer_state is None else trainer_state,
                    log_extra=lambda column, values: None,
                    log_metric=lambda name, value: None,
                )
            )
        except SystemExit as error:
            raise UserError(f"the reward function {name} called exit(): mend it") from error
        values = list(values)
        if len(values) != len(completions):
            raise UserError(
                f"{name} returned {len(values)} rewards for {len(completions)} completions: return one for each"
            )
        for place, value in enumerate(values):
            if value is None or math.isnan(float(value)):  # TRL keeps None as NaN: both say that it does not judge
                continue
            if not math.isfinite(float(value)):
                raise UserError(f"{name} returned {value!r} for completion {place}: expected a finite number or None")
            totals[place] = (totals[place] or 0.0) + float(value)
    return totals


def _finished(result: Any) -> Any:
    """What an async function returns, run on an event loop of its own in another thread: this one
    may have a loop already.
    """
    if not inspect.isawaitable(result):
        return result
    outcome: list[Any] = []

    async def wait() -> Any:
        return await result

    def run() -> None:
        try:
            outcome.append((asyncio.run(wait()), None))
        except BaseException as error:  # raised again below, in the thread that asked
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="async-reward")
    thread.start()
    thread.join()
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
