"""A stranger's checkpoint: its record opens no file, imports nothing and runs nothing, unless the user says so."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from entropy_experiments.buffers import recorded_task, sampling_plan
from entropy_experiments.cli import app
from entropy_experiments.console.doctor import examine
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.forecast.forecast import forecast_analysis
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.run import run_sweep
from rl_training.configuration import load_config
from rl_training.errors import UserError
from rl_training.run.sidecar import SIDECAR_NAME
from rl_training.tasks.trust import REMEDY, why_trust_is_needed
from rl_training.train import run_training
from tests.entropy_experiments.small_analysis import OFF, SMALL, config
from tests.tiny_policy import tiny_train_config

STRANGER = """
open('imported', 'w').close()
def f(prompts, completions, **columns):
    return [float(i % 2) for i in range(len(prompts))]
"""
RECORDS: dict[str, dict[str, Any]] = {
    "a module in the working directory": {"reward": "stranger:f"},
    "a file in the working directory": {"reward": "stranger.py:f"},
    "a module that is installed": {"reward": "os:getcwd"},
    "a file": {"source": "jsonl", "path": "watched.jsonl", "arguments": {}},
    "a pipe": {"source": "jsonl", "path": "pipe", "arguments": {}},
    "a scorer that evaluates": {"name": "countdown", "reward": "default", "arguments": {}},
    "an evaluating reward": {"reward": "math_verify"},
    "too many prompts": {"size": 10**12, "reward": "last_number"},
    "arguments without end": {"arguments": {"min_terms": 10**9, "max_terms": 10**9}, "reward": "last_number"},
}


@pytest.fixture
def strangers(checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, in whose surroundings lies what its record names; nothing of that may be opened."""
    here = checkpoint_copy.parents[1]
    (here / "stranger.py").write_text(STRANGER)
    (here / "watched.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    os.mkfifo(here / "pipe")
    monkeypatch.chdir(here)
    monkeypatch.setattr(recorded_task, "why_trust_is_needed", why_trust_is_needed)  # as users have it, not as the tests
    return checkpoint_copy


_opened: list[str] | None = None


def _watch(event: str, given: Any) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(given[0]))


@pytest.fixture(scope="module")
def _hook() -> None:
    sys.addaudithook(_watch)  # there is no way to take it off again


@pytest.fixture
def watched_opening(_hook: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that this process opens in the test."""
    opened: list[str] = []
    monkeypatch.setitem(globals(), "_opened", opened)
    return opened


def _record(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / SIDECAR_NAME
    data = json.loads(path.read_text())
    data["task"] = {**data["task"], **changes}
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_opens_and_imports_nothing(
    strangers: Path, monkeypatch: pytest.MonkeyPatch, watched_opening: list[str], name: str
) -> None:
    _record(strangers, **RECORDS[name])
    opened = watched_opening
    monkeypatch.setattr(sampling_plan, "load_task", lambda task: opened.append("a task was made"))
    path_before = list(sys.path)
    calls = {
        "analyze": lambda: run_fisher_analysis(strangers, config(f"output_dir={strangers.parents[1]}/out")),
        "dry run": lambda: forecast_analysis(strangers, config()),
        "sweep": lambda: run_sweep(
            [strangers.parent], load_config(SweepConfig, None, [*SMALL, f"output_dir={strangers.parents[1]}/out"])
        ),
    }
    for call in calls.values():
        with pytest.raises(UserError, match="the checkpoint's record names .*--trust.*checkpoint.task") as caught:
            call()
        assert REMEDY in str(caught.value) and "\n" not in str(caught.value)
    lines, healthy = examine(strangers)
    assert not healthy and any("record names" in line and REMEDY in line for line in lines)
    assert not [f for f in opened if "watched" in f or "pipe" in f or "stranger" in f or "task" in f], opened
    assert not Path("imported").exists() and "stranger" not in sys.modules and sys.path == path_before


def test_doctor_and_analyze_say_it_on_the_command_line(strangers: Path) -> None:
    _record(strangers, reward="stranger.py:f")
    runner = CliRunner()
    assert runner.invoke(app, ["doctor", str(strangers)]).exit_code == 1
    assert runner.invoke(app, ["doctor", str(strangers), "--trust"]).exit_code == 0
    refused = runner.invoke(app, ["analyze", str(strangers), *SMALL])
    assert isinstance(refused.exception, UserError) and "--trust" in str(refused.exception)
    assert not Path("imported").exists()


@pytest.mark.long
def test_the_remedies_work(strangers: Path) -> None:
    """--trust runs what the record names; a task of the user's own goes before it."""
    _record(strangers, reward="stranger.py:f")
    trusted = run_fisher_analysis(strangers, config(), folder=strangers.parent / "trusted", trust=True)
    assert Path("imported").exists() and trusted.report.exists()
    Path("imported").unlink()
    task = "{size: 24, heldout_size: 16, arguments: {max_terms: 2, max_digits: 1, min_digits: 1}, reward: 'own.py:f'}"
    Path("own.py").write_text(STRANGER.replace("imported", "own_imported"))
    given = run_fisher_analysis(strangers, config(f"checkpoint.task={task}"), folder=strangers.parent / "given")
    assert given.report.exists() and Path("own_imported").exists() and not Path("imported").exists()


def test_a_task_that_is_not_needed_is_left_alone(strangers: Path) -> None:
    """With both buffers from files the record's task is not asked for."""
    _record(strangers, reward="stranger.py:f")
    files = "entropy_analysis.sampling.eval_sequences_path=e", "entropy_analysis.sampling.train_sequences_path=t"
    sidecar = recorded_task.read_sidecar(strangers)
    assert recorded_task.task_of_analysis(sidecar, config(*files), trust=False) is None


HOSTILE = (
    "__import__('os').system('touch made')", "open('made', 'w')", "exit()", "9**9**9**9", "[[exit()]]", "().__class__",
    "__import__('os').kill(__import__('os').getppid(), 9)", "1",
)  # fmt: skip


@pytest.fixture
def hostile_policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a policy draws is read as these texts."""
    from transformers import PreTrainedTokenizerBase

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "batch_decode",
        lambda self, sequences, **_: [HOSTILE[i % len(HOSTILE)] for i in range(len(sequences))],
    )


@pytest.mark.long  # tests/rl_training/tasks/test_sandbox.py stops such texts one by one
def test_hostile_completions_through_train_analyze_and_sweep(
    tiny_run: Path, hostile_policy: None, tmp_path: Path
) -> None:
    task = {
        "name": "countdown",
        "arguments": {},
        "reward": "default",
        "reward_timeout": 0.2,
        "size": 24,
        "heldout_size": 16,
    }
    policy = tiny_run.parent / "policy"
    run = run_training(
        tiny_train_config(policy, tmp_path / "run", task=task, training={"steps": 1, "save_every": 1}), quiet=True
    )
    assert (run / "checkpoint-1" / SIDECAR_NAME).exists()
    with pytest.raises(UserError, match="'countdown', whose scorer may evaluate"):
        run_fisher_analysis(run, config(), folder=tmp_path / "no")
    analysis = run_fisher_analysis(run, config(), folder=tmp_path / "analysis", trust=True, keep_going=True)
    assert analysis.report.exists()
    off = [f"entropy_analysis.analysis.{name}=false" for name in (*OFF, "buffers", "prompt_structure")]
    swept = run_sweep(
        [run], load_config(SweepConfig, None, [*SMALL, *off]), folder=tmp_path / "sweep", trust=True, keep_going=True
    )
    assert swept.report is not None and not swept.failed
    assert not (tmp_path / "made").exists()


def test_a_reward_that_exits_stops_training_in_one_line(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("def f(prompts, completions, **columns): exit()\n")
    task = {"reward": f"{tmp_path}/leaving.py:f"}
    with pytest.raises(UserError, match=r"leaving.py:f called exit\(\) on 16 completions"):
        run_training(tiny_train_config(tiny_run.parent / "policy", tmp_path / "run", task=task), quiet=True)


@pytest.mark.long
def test_trls_contract_in_training_and_in_analysis(tiny_run: Path, tmp_path: Path) -> None:
    """An async reward that takes everything, logs, and judges only a part of the completions."""
    (tmp_path / "own.py").write_text(
        "async def judge(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, prompt_index):\n"
        "    log_metric('seen', float(len(prompts)))\n"
        "    log_extra('first', [ids[0] for ids in completion_ids])\n"
        "    assert trainer_state.global_step >= 0\n"
        "    return [None if i % 4 == 0 else float(ids[0] % 2) + i % 2 for i, ids in enumerate(completion_ids)]\n"
    )
    task = {"reward": f"{tmp_path}/own.py:judge"}
    run = run_training(tiny_train_config(tiny_run.parent / "policy", tmp_path / "run", task=task), quiet=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["seen"] > 0 and line["reward"] == line["reward"] for line in lines)
    found = run_fisher_analysis(run, config(), folder=tmp_path / "analysis", trust=True)
    training = found.training
    assert training.weights is not None and training.advantages is not None
    unjudged = [i for i, reward in enumerate(training.rollouts.reward) if reward is None]
    assert unjudged and len(unjudged) < len(training.rollouts)
    index = training.rollouts.prompt_index
    for i, reward in enumerate(training.rollouts.reward):  # as TRL: the mean is of those that were judged
        group = [r for r, p in zip(training.rollouts.reward, index, strict=True) if p == index[i] and r is not None]
        expected = 0.0 if reward is None else reward - sum(group) / len(group)
        assert float(training.advantages[i]) == pytest.approx(expected, abs=1e-12)
        assert (float(training.weights[i]) == 0.0) == (abs(expected) < 1e-12)
    recorded = run_fisher_analysis(
        run, config("entropy_analysis.sampling.train_prompts=from_run"), folder=tmp_path / "from_run", trust=True
    )
    assert None in recorded.training.rollouts.reward
