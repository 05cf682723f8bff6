"""Rewards of completions out of the sandbox: a number each, whatever the text does.

A text that takes too long, needs too much memory or ends its process earns 0 (or stops the run, as
configured), with one warning that names the scorer and the text. A scorer that raises on a
malformed text has not accepted it: that is 0 as well.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from rl_training.errors import UserError
from rl_training.tasks.sandbox.client import ScoringServer, ServerEnded, ServerGone

_logger = logging.getLogger(__name__)
_MOST_CHILDREN = 4
_SHOWN = 80
# A child has so many seconds beyond its limit before the server gives it up, and the parent gives
# up the server.
_GRACE_SECONDS, _SLACK_SECONDS = 6.0, 30.0
_SETUP_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class RewardLimits:
    """What scoring one completion may take.

    Attributes:
        on_error: what a failure does; None: 0 for built-in rewards, stop for one's own.
        own_process: one's own function runs in a child process, and the limits are those of a call.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    on_error: Literal["zero", "raise"] | None = None
    own_process: bool = False


class SandboxedScorer:
    """Scores texts in a server's children.

    Args:
        apart: a fresh process for every text, which scorers need that evaluate it; else one for
            many texts.
    """

    def __init__(self, name: str, server: ScoringServer, limits: RewardLimits, apart: bool) -> None:
        self.name = name
        self._server, self._limits, self._apart = server, limits, apart
        self._warned: set[str] = set()

    def score(self, items: list[list[Any]]) -> list[float]:
        """Rewards in [0, 1] of [key, text] items.

        Raises:
            UserError: one fails and failures are to stop the run.
        """
        rewards = []
        for (_, text), (value, reason) in zip(items, self._ask("score", items), strict=True):
            if value is not None and not 0.0 <= value <= 1.0:
                value, reason = None, f"scored {value:g}, which is outside 0 to 1"
            if value is None:
                self._fail(text, reason)
            elif reason:
                self._warn("malformed", f"cannot score {text[:_SHOWN]!r}, which earns 0: {reason}")
            rewards.append(value or 0.0)
        return rewards

    def readable(self, answers: list[str]) -> list[bool]:
        """Whether math-verify can read each answer."""
        return [value == 1.0 for value, _ in self._ask("readable", answers)]

    def _ask(self, what: str, items: list[Any]) -> list[tuple[float | None, str]]:
        if not items:
            return []
        parallel = max(1, min(_MOST_CHILDREN, _cores()))
        order = {
            what: items,
            "seconds": self._limits.seconds,
            "memory": self._limits.memory,
            "parallel": parallel,
            "apart": self._apart,
        }
        longest = (len(items) / parallel + 1) * (self._limits.seconds + _GRACE_SECONDS) + _SLACK_SECONDS
        try:
            try:
                answer = self._server.ask(order, longest)
            except ServerEnded:  # a text cannot have done that: somebody ended it, short of memory perhaps
                answer = self._server.ask(order, longest)
        except ServerGone as error:
            return [(None, f"could not be scored: the sandbox {error}")] * len(items)
        results = answer.get("results")
        if not isinstance(results, list) or len(results) != len(items):
            return [(None, "could not be scored: the sandbox answered something else")] * len(items)
        return [_checked(result) for result in results]

    def _fail(self, text: str, reason: str) -> None:
        what = f"{text[:_SHOWN]!r} {reason}"
        if self._limits.on_error == "raise":
            raise UserError(
                f"{self.name}: scoring {what}: set task.on_reward_error=zero to give such a completion 0 and go on"
            )
        self._warn("failed", f"could not score a completion, which earns 0 (so will others like it): {what}")

    def _warn(self, kind: str, words: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            _logger.warning("%s %s", self.name, words)


def _checked(result: Any) -> tuple[float | None, str]:
    """(value, reason) of what came through the socket; None for anything but a finite number."""
    if not isinstance(result, list) or len(result) != 2:
        return None, "gave no result"
    value, reason = result
    words = " ".join(str(reason).split())[:200] if reason else ""
    if isinstance(value, float) and math.isfinite(value):
        return value, words
    return None, words or "gave no number"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _mathematics_of(process: int) -> ScoringServer:
    return ScoringServer(("math_verify",), {"warm_up": True}, _SETUP_SECONDS)


def mathematics_server() -> ScoringServer:
    """This process's server for math-verify."""
    return _mathematics_of(os.getpid())


def problems_server(
    name: str, arguments: dict[str, Any], seed: int, count: int
) -> tuple[ScoringServer, list[tuple[str, str | None]]]:
    """A server with up to `count` problems of a reasoning-gym data set, and their (question,
    answer).

    Raises:
        UserError: an unknown data set or argument, or where making them takes too long or too much.
    """
    order = {"problems": {"name": name, "arguments": arguments, "seed": seed, "count": count}}
    server = ScoringServer(("reasoning_gym",), order, _SETUP_SECONDS)
    pairs = server.start().get("problems")
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(f"task.name: reasoning-gym {name} made something else than questions and answers")
    return server, [(question, answer) for question, answer in pairs]


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and (pair[1] is None or isinstance(pair[1], str))
    )
