"""The locks hold every package that constraints.txt pins, in that version, each file with a hash; and licences are of these."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Normalised name -> version and hashes."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines():
        if begun := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            hashes: list[str] = []
            found[normal(begun[1])] = begun[2], hashes
        elif line.startswith(" "):
            hashes += re.findall(r"--hash=sha256:([0-9a-f]{64})(?!\w)", line)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def test_every_pin_is_locked_in_its_version_with_hashes() -> None:
    lock, torch = locked("lock.txt"), locked("torch.txt")
    assert not lock.keys() & torch.keys() and "torch" in torch
    for name, version in pinned().items():
        found, hashes = {**lock, **torch}[name]
        assert found == version and hashes, f"{name}: python requirements/write.py"


def test_nothing_is_locked_that_is_neither_pinned_nor_for_other_systems() -> None:
    """What other systems need alone has a marker; all else is in constraints.txt."""
    text = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
    bare = {normal(m[1]) for m in re.finditer(r"^([A-Za-z0-9._-]+)==[^\s;]+ \\$", text, re.MULTILINE)}
    assert bare <= pinned().keys(), f"pin {sorted(bare - pinned().keys())} in constraints.txt"


def test_licences_are_of_what_is_pinned() -> None:
    from docs.licences import PAGE, page

    try:
        wanted = page()
    except SystemExit as error:
        pytest.skip(str(error))  # another environment than the pinned one
    assert PAGE.read_text(encoding="utf-8") == wanted, "python docs/licences.py"
