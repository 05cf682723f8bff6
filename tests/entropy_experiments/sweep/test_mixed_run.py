"""Checkpoints of one run folder whose completions came from several distributions: no course of entropy is drawn through them."""

import json
import shutil

import pytest

from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.targets import plan_sweep
from rl_training.errors import UserError


@pytest.fixture
def run(tiny_run, tmp_path):
    for step in (4, 5, 6):
        folder = tmp_path / "mine" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        shutil.copy(tiny_run / "checkpoint-4" / "entropy_experiments.json", folder)
    return tmp_path / "mine"


def edit(run, step, **changes):
    path = run / f"checkpoint-{step}" / "entropy_experiments.json"
    record = json.loads(path.read_text())
    record["sampling"] |= changes
    path.write_text(json.dumps(record))


CHANGES = {
    "temperature": {"temperature": 0.7},
    "max_completion_length": {"max_completion_length": 5},
    "eos_token_ids": {"eos_token_ids": [1, 2]},
    "chat template": {"chat_template_sha256": "0" * 64},
    "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_two_distributions_in_one_run_are_refused(run, name):
    """Entropies at temperatures 1 and 0.7 were subtracted from one another, and told as training's doing."""
    edit(run, 6, **CHANGES[name])
    with pytest.raises(UserError, match=f"{name}.* at checkpoint 4 and .* at checkpoint 6.*checkpoints.steps"):
        plan_sweep({"mine": run}, SweepConfig())
    parts = SweepConfig(checkpoints={"steps": [4, 5]})
    assert [target.step for target in plan_sweep({"mine": run}, parts)] == [4, 5]


def test_what_is_equal_is_missing_or_cannot_be_read_is_not(run, tmp_path):
    assert len(plan_sweep({"mine": run}, SweepConfig())) == 3
    edit(run, 4, chat_template_sha256=None)  # of an earlier release
    (run / "checkpoint-5" / "entropy_experiments.json").write_text("{")
    assert len(plan_sweep({"mine": run}, SweepConfig())) == 3, "a damaged record is its own analysis' to tell"
    other = shutil.copytree(run, tmp_path / "other")
    for step in (4, 6):
        edit(other, step, temperature=0.7)
    assert len(plan_sweep({"mine": run, "other": other}, SweepConfig())) == 6, (
        "runs are compared with words, not refused"
    )
