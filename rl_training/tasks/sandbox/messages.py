"""Messages between the parent, the sandbox's first process and its servers: JSON behind four bytes
of length.

Nothing is ever unpickled: what arrives is numbers, texts, lists and dicts, and whoever reads checks
their shape.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

LARGEST = 1 << 28
"""Bytes; a longer message is refused."""


class Closed(Exception):
    """The other side is gone, or does not keep to the form."""


class TooLate(Exception):
    """The other side did not answer in time."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Raises Closed when nobody listens."""
    data = json.dumps(message).encode("ascii")
    view = memoryview(struct.pack("!I", len(data)) + data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise Closed(str(error)) from error


def receive(descriptor: int, seconds: float | None = None, first: bytes = b"") -> dict[str, Any]:
    """The next message.

    Args:
        first: bytes of it that have been read. Raises Closed, or TooLate after `seconds`.
    """
    end = None if seconds is None else time.monotonic() + seconds
    data = bytearray(first)
    _fill(descriptor, data, 4, end)
    length = struct.unpack("!I", data[:4])[0]
    if length > LARGEST:
        raise Closed(f"a message of {length} bytes")
    _fill(descriptor, data, 4 + length, end)
    try:
        message = json.loads(data[4:].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise Closed("not JSON") from error
    if not isinstance(message, dict):
        raise Closed("not an object")
    return message


def _fill(descriptor: int, data: bytearray, size: int, end: float | None) -> None:
    while len(data) < size:
        if end is not None:
            waiter = select.poll()
            waiter.register(descriptor, select.POLLIN)
            if not waiter.poll(max(0, round((end - time.monotonic()) * 1000))):
                raise TooLate
        try:
            part = os.read(descriptor, min(1 << 20, size - len(data)))
        except OSError as error:
            raise Closed(str(error)) from error
        if not part:
            raise Closed("end of file")
        data += part
