"""Chat templates under limits of time, memory and length: they come with a tokenizer, and whoever
made that may be a stranger.

Inside `limited_templates` everything that transformers renders by a chat template, for us and for
TRL, is rendered in the sandbox (rl_training.tasks.sandbox.template_renderer), by the same function
and with the same result. Where there is no sandbox (Windows), and for arguments that are no plain
data, templates are rendered in this process, without limits.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rl_training.errors import UserError
from rl_training.tasks.sandbox.client import ScoringServer, ServerEnded, ServerGone
from rl_training.tasks.sandbox.strength import SandboxRefused, is_required

_logger = logging.getLogger(__name__)
_MODULE = "transformers.utils.chat_template_utils"
SECONDS, SECONDS_A_PROMPT = 10.0, 0.05
"""That rendering some prompts together may take, and more for each of them."""
MEMORY, LONGEST = 1 << 30, 1 << 22
"""Bytes that it may take, and characters that a prompt may have."""
_AT_A_TIME = 64
_SLACK_SECONDS = 30.0
_lock = threading.Lock()
_entered: list[Any] = []
"""transformers' own function, once for each `limited_templates` that is entered."""


class TemplateError(UserError):
    """A template that cannot be rendered; `words` say why, in one line."""

    def __init__(self, words: str) -> None:
        super().__init__(f"the chat template cannot be rendered: {words}")
        self.words = words


@functools.cache
def _server_of(process: int) -> ScoringServer | None:
    server = ScoringServer((_MODULE,), {"templates": True}, 60.0)
    try:
        server.start()
    except SandboxRefused:
        raise
    except UserError as error:
        if is_required():
            raise
        _logger.warning("chat templates are rendered without limits of time and memory: %s", error)
        return None
    return server


@contextmanager
def limited_templates() -> Iterator[None]:
    """Within it transformers' chat templates are rendered under limits, in this whole process.

    May be nested.

    A template that fails or exceeds a limit raises TemplateError where it is rendered.
    """
    from transformers import tokenization_utils_base

    place: Any = tokenization_utils_base
    with _lock:
        plain = _entered[0] if _entered else place.render_jinja_template
        _entered.append(plain)
        place.render_jinja_template = _Limited(plain)
    try:
        yield
    finally:
        with _lock:
            _entered.pop()
            if not _entered:
                place.render_jinja_template = plain


class _Limited:
    """Stands in for transformers' `render_jinja_template`."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain

    def __call__(self, conversations: list[Any], **arguments: Any) -> tuple[list[str], list[Any]]:
        from transformers.utils import get_json_schema

        tools = arguments.get("tools")
        if isinstance(tools, list):  # as transformers does with functions
            arguments["tools"] = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
        server = _server_of(os.getpid())
        if server is None or not _is_plain(conversations) or not _is_plain(arguments):
            return self._plain(conversations=conversations, **arguments)
        texts: list[str] = []
        generation: list[Any] = []
        for first in range(0, len(conversations), _AT_A_TIME):
            some = conversations[first : first + _AT_A_TIME]
            answer = _ask(server, {"conversations": some, **arguments}, SECONDS + SECONDS_A_PROMPT * len(some))
            texts += answer["rendered"]
            generation += [[tuple(span) for span in spans] for spans in answer["generation"]]
        return texts, generation


def _ask(server: ScoringServer, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    order = {"render": request, "seconds": seconds, "memory": MEMORY, "longest": LONGEST, "clock": _clock()}
    try:
        try:
            answer = server.ask(order, seconds + _SLACK_SECONDS)
        except ServerEnded:  # no template can do that: somebody ended it, short of memory perhaps
            answer = server.ask(order, seconds + _SLACK_SECONDS)
    except ServerGone as error:
        raise TemplateError(f"rendering it {error}") from error
    texts, generation = answer.get("rendered"), answer.get("generation")
    if isinstance(texts, list) and isinstance(generation, list) and all(isinstance(t, str) for t in texts):
        if len(texts) == len(request["conversations"]):
            return answer
    words = " ".join(str(answer.get("failed", "it was not rendered")).split())
    raise TemplateError(words)


def _clock() -> str:
    """This process's time zone of today, as the C library reads it from TZ: a template may print
    the date.
    """
    now = time.localtime()
    west = -(now.tm_gmtoff or 0)
    hours, minutes = divmod(abs(west) // 60, 60)
    return f"<{now.tm_zone or 'UTC'}>{'-' if west < 0 else ''}{hours:02d}:{minutes:02d}"


def _is_plain(value: Any) -> bool:
    """Whether JSON carries it unchanged."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False
