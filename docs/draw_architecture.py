"""Draw the import graph of the packages' rooms into docs/architecture.md: `make architecture`.

A room is a folder or a module directly inside a package. An arrow points from a room to one that it imports; arrows that
follow from others (a path over a third room) are left out, so that the picture stays readable. Arrows between two rooms that
import each other's modules are drawn both ways. With --check nothing is written, and the exit status is 1 if the page is old.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("entropy_core", "rl_training", "entropy_experiments")
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn: {package} -->", "<!-- end -->"


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def rooms(package: str) -> dict[str, set[str]]:
    """Room -> the rooms of the same package that it imports. Modules that only give a public name elsewhere are left out."""
    folder = ROOT / package
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).with_suffix("").parts
        if inside[0] in ("__init__", "__main__") or "results" in inside:
            continue
        found.setdefault(inside[0], set())
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] != inside[0]:
                found[inside[0]].add(parts[1])
    imported_by_some = set().union(*found.values())
    return {
        room: {target for target in targets if target in found}
        for room, targets in found.items()
        if room in imported_by_some or len(targets) > 1
    }


def reduced(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The edges that no longer path makes superfluous."""

    def reach(start: str, without: tuple[str, str]) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            room = todo.pop()
            for target in graph.get(room, ()):
                if (room, target) != without and target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    edges = [(room, target) for room in sorted(graph) for target in sorted(graph[room])]
    return [edge for edge in edges if edge[1] not in reach(edge[0], edge)]


def drawing(package: str) -> str:
    """A package's rooms as a Mermaid graph."""
    graph = rooms(package)
    lines = [f"    {room}[{room}{'/' if (ROOT / package / room).is_dir() else ''}]" for room in sorted(graph)]
    lines += [f"    {room} --> {target}" for room, target in reduced(graph)]
    return "\n".join(["```mermaid", "graph TD", *lines, "```"])


def drawn(text: str) -> str:
    """The page with every drawing made anew."""
    for package in PACKAGES:
        begin = BEGIN.format(package=package)
        head, rest = text.split(begin, 1)
        _, tail = rest.split(END, 1)
        text = f"{head}{begin}\n{drawing(package)}\n{END}{tail}"
    return text


def main() -> int:
    """Write the page, or with --check compare it."""
    old = PAGE.read_text(encoding="utf-8")
    new = drawn(old)
    if "--check" in sys.argv[1:]:
        if new != old:
            print("docs/architecture.md is older than the imports: run `make architecture`")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
