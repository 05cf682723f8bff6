"""Whether the regular expressions in an adapter's configuration end, tried in a process that can be stopped.

PEFT matches them against the name of every module of the base model, and some expressions take for ever on some names (nested
repeats). Nothing in the same process can interrupt a match.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rl_training.errors import UserError

_SECONDS = 5.0
_IN_TEXT, _IN_KEYS = ("target_modules", "exclude_modules", "layers_pattern"), ("rank_pattern", "alpha_pattern")
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        whole, end = re.compile(pattern), re.compile(rf"(.*\\.)?({pattern})$")
    except re.error:
        continue  # PEFT will say so
    for name in names:
        whole.fullmatch(name), end.match(name)
"""


def refuse_endless_patterns(where: str, content: Mapping[str, Any], names: Iterable[str]) -> None:
    """names: those of the base model's modules. Raises UserError for expressions that take too long on them."""
    texts = [value for key in _IN_TEXT for value in _listed(content.get(key))]
    keys = [pattern for key in _IN_KEYS if isinstance(content.get(key), dict) for pattern in content[key]]
    # A plain name matches at once.
    patterns = [
        p for p in (*texts, *keys) if isinstance(p, str) and not p.replace(".", "").replace("-", "").isidentifier()
    ]
    if not patterns:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, list(names)]).encode(),
            timeout=_SECONDS,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        shown = max(patterns, key=len)[:80]
        raise UserError(
            f"{where}: matching its patterns ({shown!r}) against the base model's modules takes more than {_SECONDS:g} s: write "
            "target_modules as a list of names"
        ) from None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | set) else [value]
