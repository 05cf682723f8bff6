"""Chat templates of strangers, rendered in a child that is ended at limits of time, memory and
length.

A template is a program: it can loop for ever, or multiply a text until the memory is full. It is
rendered by the very function that transformers renders with, in a process that holds nothing and
can do nothing else (lockdown.py).

    {"render": arguments of render_jinja_template, "seconds", "memory", "longest", "clock"}
        -> {"rendered": [texts], "generation": [...]} or {"failed": words}
"""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any

from rl_training.tasks.sandbox import lockdown, messages

_RESULT_DESCRIPTOR = 3
_GRACE_SECONDS = 5.0
_LONGEST_WORDS = 300


def render_in_child(order: dict[str, Any], layers: list[str], taken: int) -> dict[str, Any]:
    """The answer to an order, in the server.

    Args:
        layers, taken: what `lockdown.enter_completion` needs.
    """
    seconds = float(order["seconds"])
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _render_and_end(order, writer, layers, seconds, taken)
    os.close(writer)
    data, whole = _read(reader, time.monotonic() + seconds + _GRACE_SECONDS)
    os.close(reader)
    if not whole:
        os._exit(1)  # with us the kernel ends our child; the parent starts another server
    _, status = os.waitpid(pid, 0)
    if not data:
        return {"failed": _cause(status, seconds)}
    try:
        answer = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        return {"failed": "its process wrote something else than a text"}
    return answer if isinstance(answer, dict) else {"failed": "its process wrote something else than a text"}


def _read(reader: int, end: float) -> tuple[bytes, bool]:
    """What the child writes, and whether it came to an end in time and in bounds."""
    data, poll = bytearray(), select.poll()
    poll.register(reader, select.POLLIN)
    while time.monotonic() < end and len(data) < messages.LARGEST:
        if poll.poll(1000):
            part = os.read(reader, 1 << 20)
            if not part:
                return bytes(data), True
            data += part
    return b"", False


def _cause(status: int, seconds: float) -> str:
    from rl_training.tasks.sandbox.server import cause_of_death

    return cause_of_death(status, seconds)


def _render_and_end(order: dict[str, Any], writer: int, layers: list[str], seconds: float, taken: int) -> None:
    """In the child, which this ends."""
    try:
        os.dup2(writer, _RESULT_DESCRIPTOR, inheritable=False)
        os.environ["TZ"] = str(order["clock"])  # a template may print the date; the zone's own file cannot be read here
        time.tzset()
        memory, longest = int(order["memory"]), int(order["longest"])
        lockdown.enter_completion(layers, _RESULT_DESCRIPTOR, seconds, memory, taken)
        data = memoryview(json.dumps(_rendered(order["render"], memory, longest)).encode("ascii"))
        while data:
            data = data[os.write(_RESULT_DESCRIPTOR, data) :]
        os._exit(0)
    finally:
        os._exit(1)


def _rendered(arguments: dict[str, Any], memory: int, longest: int) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, generation = render_jinja_template(**arguments)
    except MemoryError:
        return {"failed": f"it needs more than {memory >> 20} MiB of memory"}
    except Exception as error:  # a template raises whatever it likes
        return {"failed": (str(error).strip() or type(error).__name__).splitlines()[0][:_LONGEST_WORDS]}
    length = max((len(text) for text in texts), default=0)
    if length > longest:
        return {"failed": f"it makes {length:,} characters of a prompt, more than {longest:,}"}
    return {"rendered": texts, "generation": generation}
