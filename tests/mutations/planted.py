"""Faults that `make mutations` plants, one at a time, in a copy of the sources: each makes a number wrong, none crashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in `file`, becomes `new`.

    tests: files of the suite that are asked (those whose business it is).
    unseen: why no self-check of a user's run sees it, where none does.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    unseen: str = ""


FAULTS = tuple(Fault(**row) for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text()))
