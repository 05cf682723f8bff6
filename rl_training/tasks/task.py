"""Verifiable tasks: prompts to train on, further ones to measure on, and the reward of a
completion.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from random import Random
from typing import Any

from rl_training.config import TaskConfig
from rl_training.errors import UserError
from rl_training.tasks import rewards
from rl_training.tasks.own_rewards import import_reward
from rl_training.tasks.sandbox.client import ScoringServer
from rl_training.tasks.sandbox.scoring import RewardLimits, SandboxedScorer
from rl_training.tasks.sources import Problem, make_reasoning_gym_problems, read_jsonl_problems
from rl_training.tasks.task_sentence import REWARD_IN_WORDS, default_reward
from rl_training.tasks.trust import COMPARING_SCORERS


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts and rewards. No prompt occurs twice, in `train` and `heldout` together.

    Each row is a JSON-serialisable dict: `prompt` (a list of chat messages), `prompt_index` (an int
    that stays with its prompt whatever the sizes of the splits), `answer` (text), and the further
    keys of a JSONL line where a reward function of one's own may want them. All rows have the same
    keys.
    """

    name: str
    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    reward_functions: list[rewards.RewardFunction]
    origin: str
    reward_name: str

    def describe(self) -> str:
        """Say in one line what the task is, how many prompts it has and what is rewarded."""
        meaning = REWARD_IN_WORDS.get(self.reward_name, "a function of your own")
        return (
            f"{self.origin}: {len(self.train)} training prompts, {len(self.heldout)} held out; "
            f"reward {self.reward_name} ({meaning})"
        )


def load_task(config: TaskConfig) -> Task:
    """Build the task that a configuration describes. Equal configurations give equal tasks.

    Raises:
        UserError: if the data set, the file or the reward function cannot be used, or has too few
            distinct prompts.
    """
    reward_name = config.reward
    if reward_name == "default":
        reward_name = default_reward(config.source)
    wanted = config.size + config.heldout_size
    server = None
    if config.source == "reasoning_gym":
        server, problems = make_reasoning_gym_problems(config, wanted)
        name = config.name
        given = ", ".join(f"{key}={value}" for key, value in config.arguments.items())
        origin = f"reasoning-gym {name}({given})"
    else:
        problems = read_jsonl_problems(str(config.path))
        name = origin = str(config.path)
    _check_count(config, len(problems))
    chosen = list(range(len(problems)))
    if config.source == "jsonl":
        # Files are often sorted, by topic or by difficulty: shuffle, so that both splits are of one
        # kind.
        Random(config.seed).shuffle(chosen)
    chosen = chosen[:wanted]
    _check_answers(problems, chosen, reward_name, name)
    own = reward_name not in REWARD_IN_WORDS
    extra = sorted({key for index in chosen for key in problems[index].columns}) if own else []
    rows = [_row(problems[index], index, config.system_prompt, extra) for index in chosen]
    limits = RewardLimits(
        seconds=config.reward_timeout,
        memory=int(config.reward_memory),
        on_error=config.on_reward_error,
        own_process=config.reward_process,
    )
    if own:
        reward = import_reward(reward_name, [key for key in rows[0] if key != "prompt"], limits)
    else:
        reward = _built_in_reward(reward_name, server, name, set(chosen), limits)
    return Task(
        name=name,
        train=rows[: config.size],
        heldout=rows[config.size :],
        reward_functions=[reward],
        origin=origin,
        reward_name=reward_name,
    )


def _row(problem: Problem, index: int, system_prompt: str | None, extra: Sequence[str]) -> dict[str, Any]:
    messages = [dict(message) for message in problem.messages]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    columns = {key: problem.columns.get(key) for key in extra}
    return {"prompt": messages, "prompt_index": index, "answer": problem.answer or "", **columns}


def _built_in_reward(
    name: str, server: ScoringServer | None, data_set: str, problems: set[int], limits: RewardLimits
) -> rewards.RewardFunction:
    if name == "score_answer":
        assert server is not None
        scorer = SandboxedScorer(f"{data_set}_score", server, limits, apart=data_set not in COMPARING_SCORERS)
        return rewards.score_answer(scorer, problems)
    if name == "math_verify":
        return rewards.math_verify_within(limits)
    return {"exact": rewards.exact, "last_number": rewards.last_number}[name]


def _check_count(config: TaskConfig, available: int) -> None:
    wanted = config.size + config.heldout_size
    if available >= wanted:
        return
    heldout = min(config.heldout_size, available // 3)
    widen = " or widen task.arguments" if config.source == "reasoning_gym" else " or add lines"
    what = f"reasoning-gym {config.name}" if config.source == "reasoning_gym" else config.path
    raise UserError(
        f"{what} has only {available} distinct prompts, but task.size {config.size} + task.heldout_size "
        f"{config.heldout_size} = {wanted} are wanted: set task.size={available - heldout} "
        f"task.heldout_size={heldout}{widen}"
    )


def _check_answers(problems: Sequence[Problem], chosen: Sequence[int], reward_name: str, name: str) -> None:
    """Refuse a reward that no completion could ever earn."""
    if reward_name not in ("exact", "last_number", "math_verify"):
        return
    if reward_name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        raise UserError("task.reward math_verify needs a package: pip install math-verify")
    answers = [problems[index].answer for index in chosen]
    if None in answers:
        raise UserError(f"task.reward {reward_name}: {name} names no single answer; take score_answer")
    texts = [str(answer) for answer in answers]
    readable = (
        rewards.are_mathematics(texts)
        if reward_name == "math_verify"
        else [_is_readable(t, reward_name) for t in texts]
    )
    for index, answer, can_be_read in zip(chosen, texts, readable, strict=True):
        if not can_be_read:
            question = problems[index].messages[-1]["content"][:60]
            raise UserError(
                f"task.reward {reward_name} cannot read {name}'s answer {answer[:80]!r} to {question!r}: "
                "take task.reward=exact, or a function of your own"
            )


def _is_readable(answer: str, reward_name: str) -> bool:
    if reward_name == "last_number":
        try:
            return Decimal(answer.strip()).is_finite()
        except InvalidOperation:
            return False
    return True
