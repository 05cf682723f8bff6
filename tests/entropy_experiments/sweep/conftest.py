"""Sweeps over stand-ins: checkpoints that hold a step alone, and analyses that are over at once."""

import json
import os
from pathlib import Path

import pytest

from entropy_experiments.sweep import run as sweep_module
from rl_training.configuration import dump_config
from tests.entropy_experiments.results_fixture import build_results


@pytest.fixture
def quick(monkeypatch):
    """Analyses that write a synthetic results folder at once; calls are counted, steps in `broken` raise."""
    calls, broken = [], set()

    def analyse(path, config, *, folder, resume, keep_going, trust, reporter):
        step = int(Path(path).name.rpartition("-")[2])
        calls.append(step)
        assert "WORLD_SIZE" not in os.environ, "an analysis would take this for a process group to join"
        if step in broken:
            raise RuntimeError("this one\nis broken")
        part = build_results(folder.with_name(folder.name + ".part"), seed=step)
        summary = json.loads((part / "summary.json").read_text())
        summary["checkpoint"]["step"] = step
        (part / "summary.json").write_text(json.dumps(summary))
        (part / "config.yaml").write_text(dump_config(config))
        part.rename(folder)

    monkeypatch.setattr(sweep_module, "run_fisher_analysis", analyse)
    return calls, broken


@pytest.fixture
def small_run(tmp_path):
    run = tmp_path / "mine"
    for step in (2, 4, 6, 8, 10):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return run
