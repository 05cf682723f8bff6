"""Where problems come from: reasoning-gym data sets and JSONL files. Each prompt occurs once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from random import Random
from typing import Any

from rl_training.errors import UserError

Message = dict[str, str]

# A finite data set is taken to be exhausted after this many draws in a row that were all seen before.
DRAWS_WITHOUT_A_NEW_PROMPT = 2000
# Some data sets allocate, or refuse, in proportion to the size that they are told.
LARGEST_DECLARED_SIZE = 20_000
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
    entry: dict[str, Any] = field(default_factory=dict)
    """The reasoning-gym entry, which the data set's own scorer needs."""


def create_reasoning_gym_dataset(name: str, arguments: Mapping[str, Any], seed: int, count: int) -> Any:
    """Instantiate a reasoning-gym data set from which `count` distinct prompts will be drawn.

    Raises
    ------
    UserError
        If the data set or an argument is unknown (valid names are given), or the data set refuses a value.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("task.source reasoning_gym needs a package: pip install reasoning-gym") from None
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `reasoning_gym.factory.DATASETS`"
        raise UserError(f"task.name: reasoning-gym has no data set {name!r}: {hint}")
    dataset_class, config_class = DATASETS[name]
    valid = [item.name for item in fields(config_class) if item.init and item.name not in ("seed", "size")]
    for argument in arguments:
        if argument not in valid:
            near = get_close_matches(argument, valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(valid)
            raise UserError(f"task.arguments: {name} has no argument {argument!r}: {hint}valid are {known}")
    # Neighbouring seeds of reasoning-gym share all but one of their problems, since problem i has seed + i.
    seed = Random(seed).getrandbits(31)
    size = max(LARGEST_DECLARED_SIZE, count)
    try:
        return dataset_class(config=config_class(seed=seed, size=size, **arguments))
    except Exception as error:  # the data sets raise whatever they like; nothing is hidden, all of it is the user's
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise UserError(f"task.arguments: {name} refuses {given}: {_first_line(error)}") from error


def draw_reasoning_gym_problems(dataset: Any, count: int) -> list[Problem]:
    """Draw problems until `count` distinct questions are found or the data set seems exhausted."""
    problems: dict[str, Problem] = {}
    draws_without_new = 0
    for index in range(dataset.config.size):
        entry = dataset[index]
        question = entry["question"]
        if question in problems:
            draws_without_new += 1
            if draws_without_new == DRAWS_WITHOUT_A_NEW_PROMPT:
                break
            continue
        draws_without_new = 0
        answer = entry["answer"]
        problems[question] = Problem(
            messages=[{"role": "user", "content": question}],
            answer=None if answer is None else str(answer),
            entry=entry,
        )
        if len(problems) == count:
            break
    return list(problems.values())


def read_jsonl_problems(path: str) -> list[Problem]:
    """Read {"prompt": text or messages, "answer": text or number} from each line; blank lines are skipped.

    Raises
    ------
    UserError
        If the file cannot be read or has bad lines, each of them named by its number.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"task.path: {path} does not exist (looked in {Path.cwd()})") from None
    except UnicodeDecodeError:
        raise UserError(f"task.path: {path} is not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"task.path: cannot read {path}: {error.strerror}") from None
    problems: dict[str, Problem] = {}
    line_of: dict[str, int] = {}
    mistakes: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            problem = _problem_from_line(line)
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


def _problem_from_line(line: str) -> Problem:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    for key in ("prompt", "answer"):
        if key not in data:
            raise ValueError(f"no {key!r}")
    prompt, answer = data["prompt"], data["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"'answer' must be text or a number, found {json.dumps(answer)}")
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
