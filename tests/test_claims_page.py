"""The page on what claims are tested against names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs/theory/what-claims-are-tested-against.md"


def test_every_test_that_the_page_names_exists() -> None:
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        names, file = re.findall(r"`([^`]*::[^`]+)`", row[3]), ""
        assert names, f"no test beside {row[1]!r}"
        for name in names:
            file, function = name.split("::")[0] or file, name.split("::")[1]
            found = [path for path in (TESTS / file, TESTS / "entropy_experiments" / file) if path.is_file()]
            assert found, f"{file}: no such file"
            assert f"def {function}(" in found[0].read_text(encoding="utf-8"), f"{name}: no such test"
