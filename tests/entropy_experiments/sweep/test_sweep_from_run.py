"""A sweep over what a run recorded: its last checkpoint has no step after it, and each checkpoint has prompts of its own."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.run import run_sweep
from entropy_experiments.sweep.targets import plan_sweep
from rl_training.configuration import load_config
from rl_training.errors import UserError
from tests.entropy_experiments.small_analysis import OFF, SMALL

QUICK = [*SMALL, *(f"entropy_analysis.analysis.{name}=false" for name in (*OFF, "buffers", "prompt_structure"))]
FROM_RUN = "entropy_analysis.sampling.eval_prompts=from_run"


def config(*overrides: str) -> SweepConfig:
    return load_config(SweepConfig, None, [*QUICK, "entropy_analysis.sampling.eval_split=train", FROM_RUN, *overrides])


def test_checkpoints_without_a_recorded_next_step_are_left_out(
    tiny_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = plan_sweep({"run": tiny_run}, config())
    assert [target.step for target in found] == [2]
    assert "left out" in caplog.text and caplog.text.count(": 4") == 1
    for overrides in (["checkpoints.steps=[2, 4]"], ["checkpoints.last=1"]):
        with pytest.raises(UserError, match="recorded nothing of the step after, .*: 4; leave them out"):
            plan_sweep({"run": tiny_run}, config(*overrides))
    assert [t.step for t in plan_sweep({"run": tiny_run}, load_config(SweepConfig, None, QUICK))] == [2, 4]


@pytest.mark.long
def test_a_sweep_over_the_runs_own_sequences(tiny_run: Path, tmp_path: Path) -> None:
    """Two checkpoints with a next step: the first is copied under another number, so that both have one."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    for name in ("trainer_state.json", "entropy_experiments.json"):
        path = run / "checkpoint-1" / name
        data = json.loads(path.read_text())
        data["global_step" if name == "trainer_state.json" else "step"] = 1
        if "sha256" in data:
            del data["sha256"]["trainer_state.json"]
            data["rollouts_sha256"] = None
        path.write_text(json.dumps(data))
    swept = run_sweep(
        [run], config("entropy_analysis.fisher_kernel.preconditioning=none"), folder=tmp_path / "sweep", keep_going=True
    )
    assert not swept.failed and swept.report is not None and [t.step for t in swept.targets] == [1, 2]
    evolution = json.loads((tmp_path / "sweep" / "evolution.json").read_text())["run"]
    assert all(row["entropy"]["value"] > 0 for row in evolution["checkpoints"])
    comparable = evolution["comparable"]
    assert comparable["prompts"] < comparable["of"]
