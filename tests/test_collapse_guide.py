"""docs/guides/my-entropy-collapses.md: every command as it is typed, every setting by its name."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import pytest

from entropy_experiments.cli import app
from tests.entropy_experiments.conftest import tiny_run as tiny_run
from tests.entropy_experiments.console.test_cli import run

GUIDE = (Path(__file__).parents[1] / "docs" / "guides" / "my-entropy-collapses.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    entropy-experiments (.+)$", GUIDE, re.MULTILINE)


def test_its_commands_are_commands():
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert [shlex.split(line)[0] for line in COMMANDS] == ["audit", "analyze", "ledger", "price", "sweep"]
    assert {shlex.split(line)[0] for line in COMMANDS} <= known and "compare" in known


def test_its_settings_are_trls():
    from trl import GRPOConfig

    table = GUIDE[GUIDE.index("in TRL's `GRPOConfig`") : GUIDE.index("A constant bonus")]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row)}
    assert {"entropy_coef", "top_entropy_quantile", "beta"} <= named
    assert named <= {field.name for field in dataclasses.fields(GRPOConfig)}


@pytest.mark.long
@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_does_what_it_says(line, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine")
    command, *rest = shlex.split(line)
    trust = ["--trust"] if command in ("audit", "ledger", "price") else []  # the tiny run's reward is the tests' own
    done = run(command, *rest, *trust, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
