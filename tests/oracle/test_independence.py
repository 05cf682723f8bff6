"""The oracle owes nothing to the code that it judges."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

UNDER_TEST = {"entropy_core", "rl_training", "entropy_experiments"}
FILES = sorted(Path(__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_import_from_the_packages_under_test(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where a name comes from"
            imported.add(node.module or "")
    roots = {name.split(".")[0] for name in imported} | {
        name.split(".")[1] for name in imported if name.startswith("tests.")
    }
    assert not roots & UNDER_TEST, f"{path.name} imports {sorted(roots & UNDER_TEST)}: the oracle must stay independent"
