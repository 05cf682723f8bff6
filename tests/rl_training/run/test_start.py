"""How a run starts, goes on and leaves its folder: damaged checkpoints, interruptions, refusals; nothing of others is touched."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

import rl_training.train
from rl_training.errors import UserError
from rl_training.run.checkpoint_digests import checkpoint_digests
from rl_training.run.folder_lock import holds_something
from rl_training.train import run_training
from tests.tiny_policy import tiny_train_config

OFF = {"enabled": False}
SMALL = {"prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_length": 4}


def settings(policy: Path, run: Path, steps: int = 2, **sections: Any):
    sections = {"training": {"steps": steps, "save_every": 1}, "entropy_probe": OFF, "rollouts": SMALL, **sections}
    return tiny_train_config(policy, run, **sections)


@pytest.fixture(scope="module")
def finished(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(settings(tiny_policy, tmp_path_factory.mktemp("start") / "run"), quiet=True)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rl_training.train.load_task", loaded)


# ---------------------------------------------------------------------- files that are wrong and have the right digest
def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(path: Path, change: Callable[[Any], Any]) -> None:
    with safe_globals():
        state = torch.load(path, weights_only=True)
    found = change(state)
    torch.save(state if found is None else found, path)


def entry(**values: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        state["state"][0] |= {name: make(state["state"][0]) for name, make in values.items()}

    return change


WRONG: dict[str, tuple[str, Callable[[Any], Any] | dict[str, Any], str]] = {
    "moments of integers": ("optimizer.pt", entry(exp_avg=lambda e: e["exp_avg"].long()), "exp_avg is int64"),
    "negative squares": ("optimizer.pt", entry(exp_avg_sq=lambda e: -e["exp_avg_sq"] - 1), "negative values"),
    "moments that are not finite": ("optimizer.pt", entry(exp_avg=lambda e: e["exp_avg"] * float("nan")), "NaN"),
    "another step": ("optimizer.pt", entry(step=lambda e: torch.tensor(7.0)), "has seen 7 steps"),
    "half a step": ("optimizer.pt", entry(step=lambda e: torch.tensor(1.5)), "no count"),
    "no moments": ("optimizer.pt", lambda s: s["state"].clear(), "holds no moments"),
    "no groups": ("optimizer.pt", lambda s: s.pop("param_groups"), "not an optimizer state"),
    "a group too many": (
        "optimizer.pt", lambda s: s["param_groups"].append({**s["param_groups"][0], "params": []}), "parameters by group",
    ),
    "another optimizer": ("optimizer.pt", entry(momentum_buffer=lambda e: e["exp_avg"]), "not the state of AdamW"),
    "a rate that is not finite": ("optimizer.pt", lambda s: s["param_groups"][0].update(lr=float("inf")), "not a finite number"),
    "a list": ("optimizer.pt", lambda s: [1], "not an optimizer state"),
    "a schedule of another step": ("scheduler.pt", lambda s: s.update(last_epoch=9), "reached step 9"),
    "a schedule without end": ("scheduler.pt", lambda s: s.update(_last_lr=[float("inf")]), "no learning rate for each"),
    "a schedule of other groups": ("scheduler.pt", lambda s: s.update(base_lrs=[1e-3] * 3), "no learning rate for each"),
    "no schedule": ("scheduler.pt", lambda s: [s], "no state of a schedule"),
    "no state of Python": ("rng_state.pth", lambda s: s.pop("python"), "no random state of Python"),
    "words of Python": ("rng_state.pth", lambda s: s.update(python=(3, (1 << 40,) * 625, None)), "no random state of Python"),
    "no state of numpy": (
        "rng_state.pth", lambda s: s.update(numpy=("MT19937", np.zeros(3, np.uint32), 0, 0, 0.0)), "no random state of numpy",
    ),
    "torch's cut short": ("rng_state.pth", lambda s: s.update(cpu=s["cpu"][:100].clone()), "no random state of torch"),
    "another random state": ("rng_state.pth", lambda s: [1, 2], "no random state of Python"),
    "the Trainer's step": ("trainer_state.json", {"global_step": 1}, "is of step 1, the checkpoint's record of step 2"),
    "no step": ("trainer_state.json", {"global_step": None}, "names no global_step"),
    "a negative step": ("trainer_state.json", {"global_step": -1}, "names no global_step"),
    "an epoch": ("trainer_state.json", {"epoch": "x"}, "epoch x is no number"),
    "a log that is none": ("trainer_state.json", {"log_history": [3]}, "log_history is no list"),
    "a key of another release": ("trainer_state.json", {"new_key": 1}, "'new_key', which the Trainer"),
    "callbacks": ("trainer_state.json", {"stateful_callbacks": []}, "stateful_callbacks is of another type"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_to_resume_from_is_validated_whatever_its_digests_say(run, tiny_policy, no_model, what) -> None:
    name, change, words = WRONG[what]
    checkpoint = run / "checkpoint-2"
    if isinstance(change, dict):
        edit_json(checkpoint / name, **change)
    else:
        edit_tensors(checkpoint / name, change)
    edit_json(checkpoint / "entropy_experiments.json", sha256=checkpoint_digests(checkpoint), own_sha256=None)
    with pytest.raises(UserError, match=words) as caught:
        run_training(settings(tiny_policy, run, 3), quiet=True, resume=True)
    assert "\n" not in str(caught.value) and "preconditioning" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "adapter_config.json", "tokenizer.json", "training_args.bin"]
)
def test_one_flipped_bit_of_any_file(run, tiny_policy, no_model, name) -> None:
    path = run / "checkpoint-2" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{name} is not the file that the trainer wrote"):
        run_training(settings(tiny_policy, run, 3), quiet=True, resume=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "entropy_experiments.json", "rng_state.pth"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(run, tiny_policy, no_model, name) -> None:
    path = run / "checkpoint-2" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name} is a pipe or a device"):
        run_training(settings(tiny_policy, run, 3), quiet=True, resume=True)


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("lora", {"r": 8, "alpha": 8}, "lora.r was 4 in this run .*, now it is 8"),
        ("optimizer", {"learning_rate": 2e-3, "micro_batch_size": 8}, "optimizer.learning_rate was 0.001"),
        ("rollouts", {**SMALL, "max_completion_length": 6}, "rollouts.max_completion_length was 4"),
        ("training", {"steps": 3, "save_every": 1, "seed": 5}, "training.seed was 42"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings(run, tiny_policy, no_model, section, values, named) -> None:
    with pytest.raises(UserError, match=named):
        run_training(settings(tiny_policy, run, 3, **{section: {"steps": 3, **values} if section == "training" else values}),
                     quiet=True, resume=True)  # fmt: skip


# ---------------------------------------------------------------------- interruptions
def test_resume_goes_on_from_the_newest_checkpoint_and_gives_the_same_bits(run, tiny_policy, tmp_path) -> None:
    whole = run_training(settings(tiny_policy, tmp_path / "whole", 3), quiet=True)
    left = run / "checkpoint-3.part" / "checkpoint-3"  # what a kill leaves
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_bytes(b"half")
    run_training(settings(tiny_policy, run, 3), quiet=True, resume=True)
    assert not list(run.glob("*.part"))
    for name in ("adapter_model.safetensors",):
        one, other = (load_file(folder / "checkpoint-3" / name) for folder in (whole, run))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "metrics.jsonl").read_text().count("\n") == (run / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_and_says_so(
    tiny_policy, tmp_path, begun
) -> None:
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "rollouts" / "step-000001.parquet").write_bytes(b"half")
    (folder / "checkpoint-1.part").mkdir()
    if begun:  # a step is done: the run is somebody's, and is only replaced where asked
        (folder / "config.yaml").write_text("a: 1\n")
        with pytest.raises(UserError, match="is not empty: .* or go on with --resume"):
            run_training(settings(tiny_policy, folder, 1), quiet=True)
    with pytest.warns(UserWarning, match="interrupted before its first checkpoint; it begins anew"):
        run_training(settings(tiny_policy, folder, 1), quiet=True, resume=begun)
    assert (folder / "checkpoint-1").is_dir() and not list(folder.glob("*.part"))


@pytest.mark.parametrize("resume", [False, True])
def test_what_no_run_wrote_is_left_alone(tiny_policy, tmp_path, no_model, resume) -> None:
    folder = tmp_path / "run"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "rollouts" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty \(it holds rollouts/mine.txt\): choose another"):
        run_training(settings(tiny_policy, folder), quiet=True, resume=resume)
    assert (folder / "rollouts" / "mine.txt").read_text() == "precious"


class _Fails(TrainerCallback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            raise self.error


def failing(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    build = rl_training.train.build_trainer

    def built(config: Any) -> Any:
        trainer, task = build(config)
        trainer.add_callback(_Fails(step, error))
        return trainer, task

    monkeypatch.setattr(rl_training.train, "build_trainer", built)


@pytest.mark.parametrize("error", [UserError("refused"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_run_that_ends_before_its_first_step_leaves_nothing(tiny_policy, tmp_path, monkeypatch, error) -> None:
    failing(monkeypatch, 1, error)
    with pytest.raises(type(error)):
        run_training(settings(tiny_policy, tmp_path / "run"), quiet=True)
    assert not holds_something(tmp_path / "run")


def test_a_run_that_ends_later_keeps_what_is_done(tiny_policy, tmp_path, monkeypatch) -> None:
    failing(monkeypatch, 2, UserError("refused"))
    with pytest.raises(UserError, match="refused"):
        run_training(settings(tiny_policy, tmp_path / "run"), quiet=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoint-1", "rollouts"} <= names and "checkpoint-2" not in names


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0",
        "PytorchStreamWriter failed writing file data/3",
    ],
)
def test_a_disk_that_fills_while_a_checkpoint_is_saved_keeps_the_one_before(
    tiny_policy, tmp_path, monkeypatch, words
) -> None:
    save, calls = torch.save, []

    def full(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if "checkpoint-2" in str(path) and str(path).endswith("optimizer.pt"):
            raise RuntimeError(words)
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="no space left on the disk of .*checkpoint-2: .*--resume"):
        run_training(settings(tiny_policy, tmp_path / "run"), quiet=True)
    assert calls and [p.name for p in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-1"]
