"""Score recorded completions anew: by the run's own reward function, and by the built-in ones that
it might be mistaken for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from entropy_experiments.audit.recorded_run import RecordedRun
from entropy_experiments.buffers.saved import with_prompts
from rl_training.config import TaskConfig
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts, rollouts_path
from rl_training.run.sidecar import Sidecar, read_sidecar
from rl_training.sampling import score
from rl_training.tasks.task import Task, load_task
from rl_training.tasks.trust import why_trust_is_needed

# Built-in rewards that compare texts and numbers, and evaluate nothing.
_OTHERS = ("exact", "last_number")
_EQUAL = 1e-6


def score_again(run: RecordedRun, steps: Sequence[int], trust: bool) -> list[str]:
    """Fill in `run.other_rewards`; a line for a person on what was scored, or why nothing was.

    Opens and imports nothing that a stranger's record names, unless `trust`.
    """
    sidecar = read_sidecar(run.checkpoints[max(run.checkpoints)])
    steps = [step for step in steps if rollouts_path(run.folder, step).exists()]
    if sidecar is None or sidecar.task is None or not steps:
        return ["rewards are those recorded; nothing says how to score the completions anew"]
    reason = why_trust_is_needed(sidecar.task)
    if reason is not None and not trust:
        return [
            f"rewards are those recorded, and were not scored anew: the record names {reason}; pass --trust if you trust it"
        ]
    try:
        task = load_task(validate_config(TaskConfig, sidecar.task, "the checkpoint's task"))
        found = {task.reward_name: _scored(run, task, steps)}
    except UserError as error:
        return [f"rewards are those recorded, and were not scored anew: {error}"]
    for name in _OTHERS:
        if name not in found and (other := _with_reward(sidecar, name)) is not None:
            found[name] = _scored(run, other, steps)
    others = _others(run, steps, found[task.reward_name])
    run.other_rewards = {name: values for name, values in found.items() if name != task.reward_name}
    if others:
        run.other_rewards[f"{task.reward_name}, scored anew"] = found[task.reward_name]
        return [
            f"{others} of the recorded rewards are others than {task.reward_name!r} gives the recorded completions now"
        ]
    return [f"every recorded reward is what {task.reward_name!r} gives its completion now"]


def _with_reward(sidecar: Sidecar, name: str) -> Task | None:
    try:
        return load_task(validate_config(TaskConfig, {**(sidecar.task or {}), "reward": name}, "the checkpoint's task"))
    except UserError:  # the task has no answers for it
        return None


def _scored(run: RecordedRun, task: Task, steps: Sequence[int]) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    recorded = [s for step in steps for s in read_rollouts(run.folder, step)]
    scored = score(with_prompts(recorded, task), task.reward_functions)
    return {(s.prompt_ids, s.completion_ids): math.nan if s.reward is None else s.reward for s in scored}


def _others(run: RecordedRun, steps: Sequence[int], again: dict[tuple[tuple[int, ...], tuple[int, ...]], float]) -> int:
    """Recorded rewards that are not what the function gives."""
    count = 0
    for sequence in (s for step in steps for s in read_rollouts(run.folder, step)):
        now = again[sequence.prompt_ids, sequence.completion_ids]
        then = math.nan if sequence.reward is None else sequence.reward
        count += not (math.isnan(now) and math.isnan(then)) and not abs(now - then) <= _EQUAL
    return count
