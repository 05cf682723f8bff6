"""Where problems come from: reasoning-gym data sets and JSONL files. Each prompt occurs once."""

import json
from dataclasses import dataclass, field
from typing import Any

from rl_training.config import TaskConfig
from rl_training.errors import UserError
from rl_training.tasks.json_lines import json_lines
from rl_training.tasks.sandbox.client import ScoringServer
from rl_training.tasks.sandbox.scoring import problems_server

Message = dict[str, str]

RESERVED_COLUMNS = frozenset({"prompt", "answer", "prompt_index", "prompts", "completions", "completion_ids"})


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One prompt with its answer, before it is numbered and assigned to a split."""

    messages: list[Message]
    """Chat messages, the last one the user's."""
    answer: str | None
    """Reference answer; None where a data set accepts several and names none."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further keys of a JSONL line, for a reward function of one's own."""


def make_reasoning_gym_problems(config: TaskConfig, count: int) -> tuple[ScoringServer, list[Problem]]:
    """Up to `count` problems of a data set, made in the sandbox, and the server that scores answers
    to them by number.

    Raises:
        UserError: an unknown data set or argument (valid names are given), or a value that the data
            set refuses.
    """
    server, pairs = problems_server(config.name, config.arguments, config.seed, count)
    return server, [
        Problem(messages=[{"role": "user", "content": question}], answer=answer) for question, answer in pairs
    ]


def read_jsonl_problems(path: str) -> list[Problem]:
    """Read {"prompt": text or messages, "answer": text or number} from each line; blank lines are
    skipped.

    Raises:
        UserError: if the file cannot be read or has bad lines, each of them named by its number.
    """
    problems: dict[str, Problem] = {}
    line_of: dict[str, int] = {}
    mistakes: list[str] = []
    for number, found in json_lines(path, "task.path"):
        try:
            problem = _problem_from(found)
        except ValueError as error:
            mistakes.append(f"line {number}: {error}")
            continue
        key = json.dumps(problem.messages)
        if key not in problems:
            problems[key], line_of[key] = problem, number
        elif problems[key].answer != problem.answer:
            mistakes.append(f"line {number}: same prompt as line {line_of[key]} with another answer")
    if mistakes:
        more = f"; and {len(mistakes) - 5} more bad lines" if len(mistakes) > 5 else ""
        raise UserError(f"{path}: {'; '.join(mistakes[:5])}{more}")
    if not problems:
        raise UserError(f'{path} holds no problems: write one {{"prompt": ..., "answer": ...}} a line')
    return list(problems.values())


def _problem_from(data: dict[str, Any] | str) -> Problem:
    if isinstance(data, str):
        raise ValueError(data)
    for key in ("prompt", "answer"):
        if key not in data:
            raise ValueError(f"no {key!r}")
    prompt, answer = data["prompt"], data["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"'answer' must be text or a number, found {json.dumps(answer)[:80]}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
        raise ValueError("'prompt' must be text or a list of {'role', 'content'} messages")
    if not messages[-1]["content"].strip():
        raise ValueError("'prompt' is empty")
    columns = {key: value for key, value in data.items() if key not in RESERVED_COLUMNS}
    return Problem(messages=messages, answer=str(answer), columns=columns)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )
