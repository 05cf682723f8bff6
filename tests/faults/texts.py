"""Files of lines that a person made: sequences of one's own, tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rl_training.config import TaskConfig
from rl_training.configuration import validate_config
from rl_training.tasks.json_lines import json_lines
from rl_training.tasks.task import load_task
from tests.faults.cases import Case

_LINES: dict[str, bytes] = {
    "not JSON": b"{", "a list": b"[1]", "a number": b"3", "a text": b'"a"', "null": b"null", "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"), "NULs": b"\0\0\0", "deep": b'{"a": ' + b"[" * 5000,
    "half a character": b'{"prompt": "\\ud800", "answer": "1"}', "NaN": b'{"prompt": NaN, "answer": "1"}',
    "a huge number": b'{"prompt": 1' + b"0" * 6000 + b"}", "a key twice": b'{"prompt": "a", "prompt": "b", "answer": "1"}',
    "no prompt": b'{"answer": "1"}', "an empty prompt": b'{"prompt": "", "answer": "1"}', "a list of prompts": b'{"prompt": [1]}',
    "no answer": b'{"prompt": "a"}',
    "a message without content": b'{"prompt": [{"role": "user"}], "answer": "1"}', "nothing": b"", "blank lines": b"\n\n\n",
}  # fmt: skip
PLACES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: None, "a folder": lambda path: path.mkdir(), "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"), "a link to itself": lambda path: path.symlink_to(path),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Of a task's file."""
    for what, line in _LINES.items():
        yield Case(
            "tasks of one's own",
            f"a line: {what}",
            _act(lambda path, line=line: path.write_bytes(line + b"\n")),
            "task|line",
        )
        twice = b'{"prompt": "a", "answer": "1"}\n' + line + b"\n"
        if line.strip():
            yield Case(
                "tasks of one's own",
                f"the second line: {what}",
                _act(lambda path, t=twice: path.write_bytes(t)),
                "task|line",
            )
    for what, make in PLACES.items():
        yield Case("tasks of one's own", f"the file: {what}", _act(make), "task")
        yield Case("lines", f"the file: {what}", _reading(make), "here")


def _act(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        make(folder / "task.jsonl")
        settings = {
            "source": "jsonl",
            "path": str(folder / "task.jsonl"),
            "size": 1,
            "heldout_size": 1,
            "reward": "exact",
        }
        load_task(validate_config(TaskConfig, settings))

    return act


def _reading(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        make(folder / "lines")
        list(json_lines(str(folder / "lines"), "here"))

    return act
