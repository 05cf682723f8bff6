"""The blocks of code in the project's pages, for tests that hold each of them against the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^(\s*)(`{3,})(\w*)")


@dataclass(frozen=True)
class Block:
    """page: relative to the repository. line: of its first line of code. language: of its fence, "" for none, "indented"."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README and its neighbours, docs/, and the pages beside benchmarks."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    return sorted(page for page in found if page.name != "CHANGELOG.md")


def blocks() -> list[Block]:
    """Every fenced and every indented block of every page."""
    return [block for page in pages() for block in _blocks_of(page)]


def _blocks_of(page: Path) -> Iterator[Block]:
    name, lines = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8").split("\n")
    place = 0
    while place < len(lines):
        start = place
        fence = _FENCE.match(lines[place])
        if fence:
            place += 1
            while not lines[place].lstrip().startswith(fence[2]):
                place += 1
            yield Block(name, start + 2, fence[3], dedent("\n".join(lines[start + 1 : place])))
        elif re.match(r"    [^\s*-]", lines[place]) and (place == 0 or not lines[place - 1].strip()):
            while place < len(lines) and (lines[place].startswith("    ") or not lines[place].strip()):
                place += 1
            yield Block(name, start + 1, "indented", dedent("\n".join(lines[start:place])).rstrip())
            continue
        place += 1


def commands(block: Block) -> list[str]:
    """The lines of a block with their continuations, comments cut off."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    joined = re.sub(r"\n {8,}(?=[\[-])", " ", joined)  # a synopsis that goes on under its first line
    return [re.split(r"(?:^|\s)#", line)[0].strip() for line in joined.split("\n")]
