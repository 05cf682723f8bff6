"""A run's folder: one run at a time, nothing through a link, and a checkpoint that is resumed is the one that was written."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rl_training.errors import UserError
from rl_training.run.folder_lock import LOCK_NAME, holds_something, locked, run_folder_locked
from rl_training.run.resume import check_resumable
from rl_training.run.rollouts import SCHEMA, read_rollouts, rollouts_path, write_rollouts
from rl_training.run.sidecar import read_sidecar
from rl_training.train import run_training, trainer_arguments
from tests.tiny_policy import tiny_train_config

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from rl_training.run.folder_lock import run_folder_locked
with run_folder_locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def no_model(monkeypatch):
    """Training that gets as far as its model fails the test."""

    def loaded(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rl_training.train.load_model_and_tokenizer", loaded)
    monkeypatch.setattr("rl_training.train.load_task", loaded)


@pytest.fixture
def holder():
    started: list[subprocess.Popen] = []

    def hold(folder: Path) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------- one run at a time
def test_a_second_run_is_refused_by_name_before_its_model_loads(tmp_path, no_model, holder):
    folder = tmp_path / "run"
    first = holder(folder)
    config = tiny_train_config(tmp_path / "policy", folder)
    with pytest.raises(UserError, match=rf"run is in use by process {first.pid} on .*: wait for it to end"):
        run_training(config, quiet=True)
    first.communicate(b"")  # it ends as it should
    assert not folder.exists(), "an empty folder of a run that wrote nothing"
    with pytest.raises(AssertionError, match="the model was loaded"):
        run_training(config, quiet=True)


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path, holder):
    folder = tmp_path / "run"
    first = holder(folder)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (folder / LOCK_NAME).exists() and not holds_something(folder)
    with run_folder_locked(folder):
        assert json.loads((folder / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (folder / LOCK_NAME).exists()


def test_shared_locks_keep_out_those_that_do_not_share(tmp_path):
    path = tmp_path / "lock"
    with locked(path, "it", shared=True):
        with locked(path, "it", shared=True):
            assert path.exists()
        assert path.exists(), "the other one still holds it"
        with pytest.raises(UserError, match="it is in use"), locked(path, "it"):
            pass
    assert not path.exists()


def test_of_several_processes_of_a_launch_the_first_holds_the_folder(tmp_path, monkeypatch):
    with run_folder_locked(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with run_folder_locked(tmp_path / "run"):
            pass


# ---------------------------------------------------------------------- links
def points_away(tmp_path: Path, name: str = "victim") -> Path:
    victim = tmp_path / name
    victim.write_text("precious")
    return victim


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "rollouts", "checkpoint-2", LOCK_NAME])
def test_a_link_in_a_run_folder_is_refused_and_its_target_left_alone(tmp_path, no_model, name):
    victim, folder = points_away(tmp_path), tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(UserError, match=f"{name} is a link to .*nothing is written through it; remove it"):
        run_training(tiny_train_config(tmp_path / "policy", folder), quiet=True)
    assert victim.read_text() == "precious" and (folder / name).is_symlink()


def test_a_folder_that_is_named_may_be_a_link_itself(tmp_path, no_model):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with pytest.raises(AssertionError, match="the model was loaded"):
        run_training(tiny_train_config(tmp_path / "policy", tmp_path / "run"), quiet=True)


# ---------------------------------------------------------------------- resuming
@pytest.fixture(scope="module")
def finished(tiny_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = tiny_train_config(tiny_policy, folder, training={"steps": 2}, entropy_probe={"enabled": False})
    run_training(config, quiet=True)
    return folder


def test_the_record_of_a_steps_sequences_is_held_against_its_digest(finished):
    checkpoint, path = finished / "checkpoint-2", rollouts_path(finished, 2)
    sidecar = read_sidecar(checkpoint)
    assert sidecar is not None and sidecar.rollouts_sha256 is not None
    check_resumable(checkpoint, finished, 3)
    content = path.read_bytes()
    first, *others = read_rollouts(finished, 2)
    assert first.reward is not None
    try:
        write_rollouts(finished, 2, [replace(first, reward=1.0 - first.reward), *others])
        assert pq.read_table(path).schema == SCHEMA
        with pytest.raises(UserError, match="step-000002.parquet is not the file that the trainer wrote"):
            check_resumable(checkpoint, finished, 3)
        path.unlink()
        check_resumable(checkpoint, finished, 3)  # a run goes on without the records of its past
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("processes", "micro", "words"),
    [("2", 1, "set rollouts.prompts_per_step"), ("1", 5, "change optimizer.micro_batch_size")],
)
def test_a_step_that_processes_or_passes_cannot_share_names_our_keys(
    monkeypatch, tmp_path, processes, micro, words
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    shape = {"prompts_per_step": 3, "completions_per_prompt": 4}
    config = tiny_train_config(tmp_path, tmp_path / "run", rollouts=shape, optimizer={"micro_batch_size": micro})
    with pytest.raises(UserError, match=words):
        trainer_arguments(config, on_cpu=True)
