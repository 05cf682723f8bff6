"""Files that are nearly right: a sound one with a few changes, of bytes or of values in its JSON, which hypothesis shrinks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

_PIECES = (
    b"", b"\0", b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"null", b"NaN", b"-1", b"1e999", b"9" * 400, b'"',
    b"\\ud800", b"{}",
    b"[" * 200, b"{{", b"{%", b"\n", b"\r\n", b"\xef\xbb\xbf", b"../", b"a: &a [*a]", b"!!python/name:os.system",
    b"cos\nsystem\n(", b"." * 90,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**63, -(10**30), 0.5, -0.0, 1e308, "", "x", "a\nb", "\ud800", "\0", "../../x", "NaN", [], {}, [[]],
    [None], {"": 1}, {"a": {"a": {}}}, [1, "x"], "y" * 5000, [0] * 300,
)  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` with one to six changes."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(("bit", "piece", "cut", "copy", "end"))):
            case "bit" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "piece":
                content[at:at] = draw(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=6)))
            case "cut":
                del content[at : at + draw(st.integers(1, 40))]
            case "copy":
                length = draw(st.integers(1, 40))
                content[at:at] = content[at : at + length]
            case "end":
                del content[at:]
    return bytes(content)


@st.composite
def changed_json(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds`, which are JSON, with one to four values, keys or entries changed."""
    content = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(content))
        if not places:
            break
        inside, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(("value", "gone", "renamed", "negated"))):
            case "gone":
                del inside[key]
            case "renamed" if isinstance(inside, dict):
                inside[draw(st.sampled_from(("", "x", "__class__", key * 2)))] = inside.pop(key)
            case "negated" if type(inside[key]) in (int, float):
                inside[key] = -inside[key]
            case _:
                inside[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return json.dumps(content).encode()


def _places(content: Any) -> list[tuple[Any, Any]]:
    out: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting and len(out) < 4000:
        here = waiting.pop()
        if isinstance(here, dict | list):
            keys = list(here) if isinstance(here, dict) else list(range(min(len(here), 8)))
            out += [(here, key) for key in keys]
            waiting += [here[key] for key in keys]
    return out


Strategy = Callable[[Sequence[bytes]], st.SearchStrategy[bytes]]
EITHER: Strategy = lambda seeds: st.one_of(changed_bytes(seeds), changed_json(seeds))  # noqa: E731 - a name for a strategy
