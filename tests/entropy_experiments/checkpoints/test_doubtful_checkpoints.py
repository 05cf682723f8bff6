"""What nothing in a plain checkpoint settles is said or refused: a schedule of one's own, the optimizer's class; and no record
acts on the terminal.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.checkpoints.learning_rates import rates_after, rates_of_last_step
from entropy_experiments.cli import app
from entropy_experiments.console.doctor import diagnose, examine
from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import PromptRendering, tokenize_prompts
from rl_training.run.folder_lock import run_folder_locked
from rl_training.run.sidecar import SIDECAR_NAME
from tests.entropy_experiments.checkpoint_edits import edit_json
from tests.entropy_experiments.checkpoint_zoo import lora, plain_checkpoint, trainer_groups
from tests.tiny_policy import character_tokenizer


def rates(schedule, step: int, rows=()) -> list[float]:
    """As a run of 10 steps at 1e-3 leaves them after `step`; `schedule`: what LambdaLR, or its like, is made of."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    scheduler = schedule(optimizer)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return rates_of_last_step(step, list(rows), optimizer.state_dict()["param_groups"], scheduler.state_dict(), 10)


@pytest.mark.parametrize(
    ("schedule", "step"),
    [
        # 0.25 after step 8 of 10 is what a linear schedule with 2 steps of warm-up has, whose step 8 was taken with 0.375
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1.0 if k < 4 else 0.25), 8),
        (lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=4, gamma=0.5), 8),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1.0, k / 5)), 5),  # its last step of warm-up
    ],
)
def test_a_schedule_of_ones_own_is_no_schedule_of_transformers(schedule, step: int) -> None:
    with pytest.raises(UserError, match="does not record the learning rate of step .*checkpoint.learning_rate"):
        rates(schedule, step)
    logged = rates(schedule, step, [{"step": step - 1, "learning_rate": 1e-3}, {"step": step, "learning_rate": 7e-4}])
    assert logged == [7e-4], "the row of that very step settles it"


def test_a_rate_that_is_given_needs_no_optimizer() -> None:
    """Of an optimizer that is refused, or was not saved, there are no groups: what is wrong with it is said, not this."""
    assert rates_after([], 1e-3, None) == [] and rates_after([], 1e-3, {"base_lrs": [1e-3]}) == []


def test_a_constant_rate_is_known_by_its_rows() -> None:
    from transformers import get_constant_schedule

    assert rates(get_constant_schedule, 8, [{"step": 5, "learning_rate": 1e-3}]) == [1e-3]
    with pytest.raises(UserError, match=r"plain function, as constant ones.*learning_rate=0\.001, .*if it was"):
        rates(get_constant_schedule, 8)


class OwnStep(torch.optim.AdamW):
    """A step of its own, and a state that cannot be told from AdamW's."""

    def step(self, closure=None):
        found = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)
        return found


def test_an_unrecorded_optimizer_is_said_to_be_unverified(tiny_run: Path, tmp_path: Path) -> None:
    folder = plain_checkpoint(
        tmp_path / "own", tiny_run.parent / "policy", lora(), lambda m: OwnStep(trainer_groups(m), lr=1e-3)
    )
    with pytest.warns(UserWarning, match="not verified: .*that torch's AdamW took its steps"):
        load_checkpoint(folder, device="cpu")


def test_terminal_escapes_of_a_record_are_shown_not_sent(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / SIDECAR_NAME, lambda record: record.update(model_name="\x1b]0;title\x07\x1b[2Jx/y"))
    printed = CliRunner().invoke(app, ["doctor", str(checkpoint_copy)]).stdout
    assert "\x1b" not in printed and "\x07" not in printed and "U+001B" in printed


def test_a_record_without_a_task_is_told(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / SIDECAR_NAME, lambda record: record.update(task=None))
    lines, _ = examine(checkpoint_copy)
    assert any("give checkpoint.task" in line for line in lines) and diagnose(checkpoint_copy).give == [
        "checkpoint.task"
    ]
    assert json.loads((checkpoint_copy / SIDECAR_NAME).read_text())["task"] is None


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for", "{{ 1 / 0 }}", "{{ ().__class__.__mro__ }}"]
)
def test_a_template_that_fails_is_one_line(template: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="the chat template cannot be rendered: ") as caught:
        tokenize_prompts(tokenizer, [[{"role": "user", "content": "1+1"}]])
    assert "\n" not in str(caught.value)


def test_tools_that_are_none_are_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot be rendered with \['tools'\]"):
        tokenize_prompts(character_tokenizer(), [[{"role": "user", "content": "1+1"}]], PromptRendering({"tools": [1]}))


def test_a_run_that_is_under_way_is_told_from_one_that_ended(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with run_folder_locked(run):
        for place in (run, sorted(run.glob("checkpoint-*"))[0]):
            assert [line for line in examine(place)[0] if f"under way: process {os.getpid()}" in line], place
    assert not [line for line in examine(run)[0] if "under way" in line]
    with run_folder_locked(tmp_path / "begun"), pytest.raises(UserError, match=r"written by process \d+ .*no whole"):
        examine(tmp_path / "begun")
    (tmp_path / "begun").mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "begun" / ".lock")
    with pytest.raises(UserError):
        examine(tmp_path / "begun")
