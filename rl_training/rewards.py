"""Reward functions in TRL's signature: `f(prompts, completions, **columns) -> list[float]`.

`exact`         1 if the completion, stripped of surrounding white space, is the answer; else 0.
`last_number`   1 if the last number in the completion equals the answer; else 0.
`math_verify`   1 if math-verify finds in the completion an expression equal to the answer; else 0.
`score_answer`  what the reasoning-gym data set's own scorer gives, in [0, 1]: it sees the content of the last
                <answer>...</answer> where there is one, else the whole stripped completion. Many scorers give
                part of the reward to a text that merely contains the answer.
`pkg.module:f`  one's own function; a module in the working directory is found too.

A completion is a string, or a list of chat messages of which the last one counts.
"""

import functools
import importlib
import inspect
import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from rl_training.errors import UserError

RewardFunction = Callable[..., list[float]]

_logger = logging.getLogger(__name__)
# What a scorer may stumble over in a text that is no answer of its kind.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    SyntaxError,
    TypeError,
    ValueError,
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion: the string itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def exact(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the stripped completion is the stripped answer, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(completion_text(completion).strip() == gold.strip()) for completion, gold in pairs]


def last_number(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number in the completion equals the answer, else 0; `1,000.0` is `1000`."""
    pairs = zip(completions, answer, strict=True)
    return [float(find_last_number(completion_text(text)) == Decimal(gold.strip())) for text, gold in pairs]


def find_last_number(text: str) -> Decimal | None:
    """Return the last number in digits; a minus sign belongs to it unless a digit or letter precedes."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def math_verify(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where math-verify finds the completion's expression equal to the answer's, else 0."""
    from math_verify import parse, verify

    limits = _time_limits()
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        found = parse(completion_text(completion), parsing_timeout=limits["parsing_timeout"])
        equal = verify(list(parse_answer(gold)), found, timeout_seconds=limits["timeout_seconds"])
        rewards.append(float(equal))
    return rewards


@functools.lru_cache(maxsize=65536)
def parse_answer(answer: str) -> tuple[Any, ...]:
    """Parse a reference answer with math-verify; bare LaTeX is understood. Empty if it is no mathematics."""
    try:
        from math_verify import parse
    except ImportError:
        raise UserError("task.reward math_verify needs a package: pip install math-verify") from None
    bare_latex = "\\" in answer and not any(sign in answer for sign in ("$", "\\[", "\\(", "\\boxed"))
    return tuple(parse(f"${answer}$" if bare_latex else answer, parsing_timeout=_time_limits()["parsing_timeout"]))


def _time_limits() -> dict[str, int | None]:
    # math-verify's limits are alarm signals, which only a main thread can set.
    in_main_thread = threading.current_thread() is threading.main_thread()
    return dict.fromkeys(("parsing_timeout", "timeout_seconds"), 5 if in_main_thread else None)


def score_answer(dataset: Any, entries: Mapping[int, dict[str, Any]], name: str) -> RewardFunction:
    """Return the reward function that asks the reasoning-gym data set's own scorer.

    `entries` maps a prompt index to the data set's entry. A scorer that raises on a malformed completion has
    not accepted it: that completion earns 0, and the first such error is logged as a warning.
    """
    warned = False

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], prompt_index: Sequence[int], **_: Any
    ) -> list[float]:
        nonlocal warned
        rewards = []
        for completion, index in zip(completions, prompt_index, strict=True):
            text = completion_text(completion)
            tagged = _ANSWER_TAG.findall(text)
            text = (tagged[-1] if tagged else text).strip()
            entry = entries[int(index)]
            try:
                rewards.append(float(dataset.score_answer(text, entry)))
            except _MALFORMED as error:
                rewards.append(0.0)
                if not warned:
                    _logger.warning("%s cannot score %r, which earns 0: %r", name, text[:80], error)
                    warned = True
        return rewards

    reward.__name__ = reward.__qualname__ = f"{name}_score"
    return reward


def import_reward(path: str) -> RewardFunction:
    """Import `pkg.module:function` and check every list that it returns.

    Raises
    ------
    UserError
        If it cannot be imported, is no function, or cannot be called as `f(prompts, completions, **columns)`;
        later, if it returns anything but one finite number a completion.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except AttributeError:
        raise UserError(f"task.reward: module {module_name!r} has no {attribute!r}") from None
    except (ImportError, SyntaxError, ValueError) as error:
        raise UserError(f"task.reward: cannot import {module_name!r}: {error}") from error
    if not callable(function):
        raise UserError(f"task.reward: {path} is not a function")
    _check_signature(function, path)

    @functools.wraps(function)
    def checked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        rewards = list(function(prompts=prompts, completions=completions, **columns))
        if len(rewards) != len(completions):
            raise UserError(f"{path} returned {len(rewards)} rewards for {len(completions)} completions")
        for position, value in enumerate(rewards):
            if not hasattr(value, "__float__") or not math.isfinite(float(value)):
                raise UserError(f"{path} returned {value!r} for completion {position}: expected a finite number")
        return [float(value) for value in rewards]

    return checked


def _check_signature(function: Callable[..., Any], path: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # built in C: only the call can tell
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise UserError(f"task.reward: {path} must take **kwargs: def f(prompts, completions, **columns)")
