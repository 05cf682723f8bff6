"""Processes of one sweep that die: they are not waited for, and what they were writing does not stay."""

import threading
from datetime import timedelta

import pytest

from entropy_experiments.sweep import run as sweep_module
from entropy_experiments.sweep.folder import SweepFolder
from entropy_experiments.sweep.run import run_sweep
from rl_training.errors import ResumableError


def test_what_a_killed_process_was_writing_is_removed_in_the_end(quick, small_run, tmp_path):
    run_sweep([small_run], folder=tmp_path / "out", shard="1/2")
    left = [
        tmp_path / "out" / f".sweep_plan.json.{'a' * 16}.part",
        tmp_path / "out/checkpoints" / f".x.json.{'b' * 16}.part",
    ]
    for path in left:
        path.touch()
    run_sweep([small_run], folder=tmp_path / "out", assemble=True)
    assert all(path.exists() for path in left), "others may be at work"
    run_sweep([small_run], folder=tmp_path / "out", shard="2/2", resume=True)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("came", [True, False])
def test_a_process_that_died_is_not_waited_for(quick, small_run, tmp_path, monkeypatch, came):
    """Launched without a launcher that is alive: the other process was seen and has ended, or never came."""
    monkeypatch.setattr(sweep_module, "_POLL_SECONDS", 0.01)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    place, ended = SweepFolder(tmp_path / "out"), threading.Event()

    def other() -> None:
        with place.locked("process-2", wait=False):
            ended.wait(1.0)

    if came:
        thread = threading.Thread(target=other)
        thread.start()
    else:
        monkeypatch.setattr(sweep_module, "JOINING", timedelta(0))
    with pytest.raises(
        ResumableError, match=r"process 2 of this sweep died or was stopped, and left \S+-\d+: .*--resume"
    ):
        run_sweep([small_run], folder=tmp_path / "out")
    if came:
        thread.join()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    sweep = run_sweep([small_run], folder=tmp_path / "out", resume=True)
    assert sweep.report is not None and not sweep.failed
