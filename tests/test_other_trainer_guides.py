"""Code of the guides for other trainers: what can run here runs, what needs a run, a GPU or another package says so."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import click
import pytest
import trl
import typer
import yaml

from entropy_experiments import cli
from entropy_experiments.buffers.dumps.read import import_rollouts
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.configuration import load_config
from tests.entropy_experiments.checkpoints.readers.conftest import formats as formats
from tests.entropy_experiments.conftest import tiny_run as tiny_run
from tests.entropy_experiments.console.test_cli import run
from tests.entropy_experiments.small_analysis import OFF
from tests.runs_of_guides import LONGEST, Runs

GUIDES = sorted(Path("docs/guides/other-trainers").resolve().glob("*.md"))
BLOCK = re.compile(r"(<!-- needs: [^>]+ -->\n\n)?```(\w+)\n(.*?)```", re.S)


def blocks(path: Path, language: str) -> list[tuple[bool, str]]:
    """(whether it says what it needs, the code)."""
    return [(bool(needs), code) for needs, kind, code in BLOCK.findall(path.read_text()) if kind == language]


def test_there_are_six_and_no_block_of_an_unknown_kind() -> None:
    assert [p.stem for p in GUIDES] == ["openrlhf", "prime-rl", "trl-deepspeed", "trl-fsdp", "unsloth", "verl"]
    for path in GUIDES:
        kinds = {kind for _, kind, _ in BLOCK.findall(path.read_text())}
        assert kinds <= {"python", "yaml", "json", "sh"}, path
        assert all(needs for needs, _ in blocks(path, "sh")), f"{path}: shells need another trainer"


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_configurations_are_valid_and_python_runs(path: Path, tmp_path: Path, monkeypatch) -> None:
    for _, code in blocks(path, "yaml"):
        data = yaml.safe_load(code)
        if "entropy_analysis" in data:
            file = tmp_path / "analysis.yaml"
            file.write_text(code)
            load_config(FisherAnalysisConfig, file, [])
            continue
        from accelerate.utils import FullyShardedDataParallelPlugin

        fields = FullyShardedDataParallelPlugin.__dataclass_fields__
        assert data["distributed_type"] == "FSDP"
        assert all({key, key.removeprefix("fsdp_")} & set(fields) for key in data["fsdp_config"])
    for _, code in blocks(path, "json"):
        json.loads(code)
    monkeypatch.chdir(tmp_path)
    # the guides are for machines with a GPU: the same class, told that there is none
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, use_cpu=True, bf16=False))
    for needs, code in blocks(path, "python"):
        compile(code, str(path), "exec")
        if not needs:
            exec(code, {"__name__": "guide"})
    if path.stem == "openrlhf":
        table = import_rollouts(tmp_path / "41.jsonl")
        assert len(table) == 2 and table.steps == [41] and table.rows[0].sampler_logprobs == [-1.0, -0.1]


@pytest.mark.parametrize("path", [*GUIDES, Path("docs/guides/rollouts.md")], ids=lambda p: p.stem)
def test_commands_are_those_of_the_program(path: Path) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    lines = re.findall(r"^    entropy-experiments (.+)$", path.read_text(), re.M)
    assert lines
    for line in lines:
        name, *arguments = line.split()
        command = group.commands[name]
        found = command.make_context(name, list(arguments), resilient_parsing=True)
        assert not [a for a in found.args if a.startswith("-")], line
        options = {o for p in command.params for o in p.opts}
        assert {a for a in arguments if a.startswith("--")} <= options, line
        overrides = [a for a in arguments if "=" in a]
        if name == "analyze":
            load_config(FisherAnalysisConfig, None, overrides)


def settings_of(path: Path) -> dict:
    """The guide's analysis.yaml, of a size that the tiny policy bears and with a reward that it sometimes has."""
    found = next(data for _, code in blocks(path, "yaml") if "entropy_analysis" in (data := yaml.safe_load(code)))
    if "task" in found["checkpoint"]:
        found["checkpoint"]["task"]["reward"] = "tests.tiny_policy:even_start_reward"
    analysis = found["entropy_analysis"]
    analysis["sampling"]["max_completion_length"] = LONGEST
    off = dict.fromkeys(OFF, False) | {"fresh_scales": [], "step_scales": [0.25, 1.0, 2.0]}
    return {**found, "entropy_analysis": {**analysis, "eval_batch_size": 16, "train_batch_size": 16, "analysis": off}}


@pytest.mark.long
@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_its_commands_are_typed_as_they_are_written(path: Path, formats: Path, tiny_run: Path, tmp_path: Path) -> None:
    Runs(formats, tiny_run / "checkpoint-4", tmp_path).of(path.stem)
    (tmp_path / "analysis.yaml").write_text(yaml.safe_dump(settings_of(path)))
    lines = re.findall(r"^    entropy-experiments (.+)$", path.read_text(), re.M)
    names = [shlex.split(line)[0] for line in lines]
    assert names[:1] == ["doctor"] and {"import", "analyze"} <= set(names)
    for line in lines:
        name, *rest = shlex.split(line)
        done = run(name, *rest, cwd=tmp_path)
        assert "Traceback" not in done.stderr and done.stdout.strip(), done.stderr
        assert done.returncode == 0 or (name == "doctor" and "entropy-experiments import" in done.stdout), (
            line,
            done.stdout,
            done.stderr,
        )
    reports = list((tmp_path / "results").rglob("report.html"))
    assert len(reports) == names.count("analyze")
    notes = json.loads((reports[0].parent / "summary.json").read_text())["sampling"]["notes"]
    given = "train_sequences_path" in settings_of(path)["entropy_analysis"]["sampling"]
    assert any("training sequences are" in note for note in notes) == given, notes
    assert len(path.read_text().split()) < 700, "two pages at most"
