"""Write docs/licences.md: the licence of every package that the pinned environment holds, as each package states it itself.

python docs/licences.py          # after a change of constraints.txt; needs the environment that it pins
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
_HEAD = """# Licences of dependencies

<!-- written by `python docs/licences.py` -->

This project is under the MIT licence. Below are the packages that `constraints.txt` pins, with what each states of itself:
its `License-Expression`, else its classifiers, else the first line of its `License` field. `python docs/licences.py` lists them
from the installed environment; nothing of theirs is distributed with this project. A licence that asks more of those who pass a
work on than to keep a notice is in bold.

| package | version | licence |
| --- | --- | --- |
"""
_ASKS_MORE = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|CDDL|GNU|Mozilla)", re.IGNORECASE)


def pinned() -> list[tuple[str, str]]:
    """(name, version) of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split(";")[0].strip().partition("==") for line in lines if not line.startswith("#"))
    return [(name, version) for name, equal, version in pins if equal]


def licence_of(found: Distribution) -> str:
    """What a package says of its licence, in one line."""
    about = found.metadata
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    classifiers = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    known = sorted({c for c in classifiers if c != "OSI Approved"})
    if known:
        return ", ".join(known)
    lines = str(about.get("License") or "").strip().splitlines()
    return lines[0][:80] if lines else "not stated"


def page() -> str:
    """The page, in Markdown. Raises SystemExit where a pinned package is not installed in that version."""
    rows = []
    for name, version in sorted(pinned(), key=lambda pair: pair[0].lower()):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{name} is not installed: run make venv first") from None
        if found.version.split("+")[0] != version:
            raise SystemExit(f"{name} is {found.version}, constraints.txt pins {version}: run make venv first")
        licence = licence_of(found).replace("|", "/")
        rows.append(f"| {name} | {version} | {f'**{licence}**' if _ASKS_MORE.search(licence) else licence} |")
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
