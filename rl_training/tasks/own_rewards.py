"""A reward function of one's own: `path/to/file.py:name`, or `pkg.module:name` of an installed
module.

TRL's contract: called with keywords alone, sync or async, one number or None for each completion.
It runs in this process, where it may hold models and state, or under limits in a child process
(rl_training.tasks.reward_process). The working directory is never put on Python's path: a file is
named by its path.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rl_training.errors import UserError
from rl_training.tasks.reward_process import RewardProcess
from rl_training.tasks.rewards import RewardFunction, completion_text
from rl_training.tasks.sandbox.scoring import RewardLimits

_logger = logging.getLogger(__name__)
SECONDS_UNTIL_A_WARNING = 60.0
_LARGEST = 3.4028234663852886e38  # of float32, which is what the trainer keeps rewards in
# What TRL gives a reward function beside the task's columns.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def import_reward(
    path: str, columns: Iterable[str] = ("answer", "prompt_index"), limits: RewardLimits | None = None
) -> RewardFunction:
    """The function under its own name, sync or async as it is, its results checked and its failures
    named.

    Args:
        columns: the task's, beside what TRL gives.

    Raises:
        UserError: if it cannot be imported, is no function, or cannot be called with these
            keywords. Later, if it raises, calls exit(), or returns anything but one finite number
            or None a completion (a failure gives 0 under task.on_reward_error=zero).
    """
    function = find_reward(path)
    if not callable(function):
        raise UserError(f"task.reward: {path} is not a function")
    _check_signature(function, path, [*_GIVEN, *columns])
    limits = limits or RewardLimits()
    watch = _Watch(path, limits)
    called = RewardProcess(path, limits) if limits.own_process else function
    if _is_async(called):
        call = cast(Callable[..., Awaitable[Any]], called)

        async def asynchronous(prompts: Sequence[Any], completions: Sequence[Any], **rest: Any) -> list[float | None]:
            found: list[list[float | None]] = []
            with watch.call(completions, found):
                found.append(_checked(await call(prompts=prompts, completions=completions, **rest), path, completions))
            return found[0]

        return _named(asynchronous, function)

    def synchronous(prompts: Sequence[Any], completions: Sequence[Any], **rest: Any) -> list[float | None]:
        found: list[list[float | None]] = []
        with watch.call(completions, found):
            found.append(_checked(called(prompts=prompts, completions=completions, **rest), path, completions))
        return found[0]

    return _named(synchronous, function)


class _Watch:
    """Around each call: a warning where it takes long, and one line where it fails."""

    def __init__(self, path: str, limits: RewardLimits) -> None:
        self._path, self._limits = path, limits
        self._warned = False

    @contextmanager
    def call(self, completions: Sequence[Any], found: list[list[float | None]]) -> Iterator[None]:
        slow = threading.Timer(SECONDS_UNTIL_A_WARNING, self._say_slow, [completions])
        slow.daemon = True
        slow.start()
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            words = f"{self._path} {_what_happened(error)} on {len(completions)} completions, the first {_first(completions)}"
            if self._limits.on_error != "zero":
                raise UserError(
                    f"task.reward {words}: mend it, or set task.on_reward_error=zero to give them 0 and go on"
                ) from error
            if not self._warned:
                self._warned = True
                _logger.warning("%s; they earn 0, and so will others where it fails again", words)
            found[:] = [[0.0] * len(completions)]
        finally:
            slow.cancel()

    def _say_slow(self, completions: Sequence[Any]) -> None:
        _logger.warning(
            "%s has been running for %g s on %d completions, the first %s: it is not stopped, since it runs in this process",
            self._path, SECONDS_UNTIL_A_WARNING, len(completions), _first(completions),
        )  # fmt: skip


def _what_happened(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "called exit()"
    frames = traceback.extract_tb(error.__traceback__)
    return f"raised {' '.join(repr(error).split())[:200]} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _first(completions: Sequence[Any]) -> str:
    return repr(completion_text(completions[0])[:80]) if completions else "none"


def _checked(result: Any, path: str, completions: Sequence[Any]) -> list[float | None]:
    if inspect.isawaitable(result):
        getattr(result, "close", lambda: None)()
        raise UserError(f"{path} returned something to be awaited: define it with async def")
    try:
        rewards = list(result)
    except TypeError:
        raise UserError(f"{path} returned {result!r}: expected a list, a number or None for each completion") from None
    if len(rewards) != len(completions):
        raise UserError(f"{path} returned {len(rewards)} rewards for {len(completions)} completions")
    return [None if value is None else _number(value, place, path) for place, value in enumerate(rewards)]


def _number(value: Any, place: int, path: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise UserError(
            f"{path} returned {value!r} for completion {place}: expected a number that is finite in float32, or None"
        )
    return number


def _named(checked: Callable[..., Any], function: Callable[..., Any]) -> RewardFunction:
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    functools.update_wrapper(checked, function, updated=())
    checked.__name__ = checked.__qualname__ = getattr(plain, "__name__", type(plain).__name__)
    return checked


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _check_signature(function: Callable[..., Any], path: str, given: list[str]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return  # built in C: only the call can tell
    kinds = {p.kind for p in parameters.values()}
    needed = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        raise UserError(f"task.reward: {path} is called with keywords: take the / out of its parameters")
    if unknown := [name for name in needed if name not in given]:
        raise UserError(
            f"task.reward: {path} asks for {unknown[0]!r}, which the task does not have: it has {', '.join(given)}"
        )
    missing = [name for name in given if name not in parameters]
    if missing and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UserError(
            f"task.reward: {path} must take **kwargs, or also {', '.join(missing)}: def f(prompts, completions, **columns)"
        )


def find_reward(path: str) -> Any:
    """The function that a path names. Raises UserError where it cannot be imported."""
    module_name, _, attribute = path.rpartition(":")
    try:
        module = _load_file(module_name) if _is_file(module_name) else importlib.import_module(module_name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"task.reward: cannot import {module_name!r}: {error!r}{_remedy(module_name, attribute)}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(f"task.reward: module {module_name!r} has no {attribute!r}") from None


def _is_file(name: str) -> bool:
    return name.endswith(".py") or "/" in name or "\\" in name


def _remedy(module_name: str, attribute: str) -> str:
    if _is_file(module_name):
        return ""
    guess = f"{module_name.replace('.', '/')}.py" if module_name else "path/to/file.py"
    return f"; the working directory is not searched: name a file by its path, task.reward={guess}:{attribute}"


def _load_file(name: str) -> Any:
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"task.reward: {name} is no file (looked in {Path.cwd()})")
    own_name = f"reward_of_ones_own_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(own_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"task.reward: {name} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own_name]
        raise
    return module
