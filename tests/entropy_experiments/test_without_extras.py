"""An installation without extras: the command line is refused in one line, and a fault of our own is not taken for that."""

from __future__ import annotations

import sys

import pytest

from entropy_experiments.__main__ import main


class _Absent:
    """A finder of modules by whom some are not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def absent(monkeypatch):
    def leave_out(name: str) -> None:
        monkeypatch.delitem(sys.modules, "entropy_experiments.cli", raising=False)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [_Absent(name), *sys.meta_path])
        monkeypatch.setattr("entropy_experiments.__main__.end_with_the_launcher", lambda: None)
        monkeypatch.setattr("entropy_experiments.__main__._caught_early", dict)

    return leave_out


def test_a_package_of_the_extras_is_named_with_what_installs_it(absent, capsys) -> None:
    absent("typer")
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert "needs the package typer" in said and "entropy-experiments[analysis]" in said


def test_a_missing_module_of_ours_is_a_fault(absent) -> None:
    absent("entropy_experiments.console.ledger")
    with pytest.raises(ModuleNotFoundError, match=r"console\.ledger"):
        main()
