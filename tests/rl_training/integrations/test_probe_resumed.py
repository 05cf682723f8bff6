"""A resumed run is probed as an undisturbed one: every number that is logged, bit by bit, in every mode of the probe."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_training.config import EntropyProbeConfig
from rl_training.errors import ResumableError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.probe_state import ProbeState, read_state, state_path, write_state
from rl_training.train import run_training
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer
from tests.tiny_policy import tiny_train_config

ROWS = [{"prompt": f"{a}-{b}="} for a in range(5) for b in range(4)]
STEPS, SAVED = 7, 3
SAVING = {"max_steps": STEPS, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": SAVED}
SMALL = {"eval_sequences": 8, "on_error": "raise"}

MODES = {
    "watch": {"measure_every": 2, "predict_every": 3, "pool_age": 4},
    "watch, with parts and shares": {"measure_every": 1, "predict_every": 2, "shares": True, "parts_every": 2},
    "watch, averaged": {"measure_every": 1, "predict_every": 2, "averaging": 0.5},
    "watch, own sequences": {"rollouts": "current", "measure_every": 1, "predict_every": 3, "bias_keep": 0.9},
    "watch, fresh": {"rollouts": "fresh", "measure_every": 2, "predict_every": 4, "entropy_floor": 0.1},
    "watch, the last step's": {"rollouts": "previous_step", "measure_every": 1, "predict_every": 2},
    "light": {"preset": "light"},
    "simple": {"mode": "simple"},
    "simple, every step": {"mode": "simple", "preset": "accurate"},
    "simple, held out": {"preset": "held_out", "averaging": 0.6},
    "simple, the last step's": {"mode": "simple", "rollouts": "previous_step", "refresh_every": 1},
    "simple, everything": {"mode": "simple", "predictors": True, "per_completion": True, "refresh_every": 3, "log_every": 2},
    "simple, not averaged": {"mode": "simple", "averaging": 0.0, "refresh_every": 4},
    "simple, fused": {"mode": "simple", "fused": True, "estimator": "split"},
    "attribution": {"mode": "attribution", "preset": "accurate"},
}  # fmt: skip
QUICK = ("watch, with parts and shares", "watch, averaged", "light", "simple, everything", "attribution")
"""One of every kind of state; the other modes keep the same in other combinations."""


def trainer_of(tiny_policy: Path, folder: Path, probe: dict, **settings: object) -> Any:
    trainer = make_trainer(tiny_policy, folder, lora=bool(probe.get("fused")), **{**SAVING, **settings})
    return trainer, attach_entropy_probe(trainer, EntropyProbeConfig(**{**SMALL, **probe}), ROWS, console=False)


def numbers(trainer: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in logged(trainer)]


def differing(one: Any, other: Any) -> list[tuple[int, str, float | None, float | None]]:
    """(entry, name, one's number, the other's) of all that is not equal to the last bit."""
    pairs = list(zip(numbers(one), numbers(other), strict=True))
    return [
        (n, name, ours.get(name), theirs.get(name))
        for n, (ours, theirs) in enumerate(pairs)
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer.model.named_parameters())


@pytest.mark.long
@pytest.mark.parametrize("mode", [m if m in QUICK else pytest.param(m, marks=pytest.mark.long) for m in MODES])
def test_plain_trl(tiny_policy, tmp_path, mode) -> None:
    whole, _ = trainer_of(tiny_policy, tmp_path / "run", MODES[mode])
    whole.train()
    again, _ = trainer_of(tiny_policy, tmp_path / "again", MODES[mode])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*begin anew")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{SAVED}"))
    assert all(torch.equal(p, weights(again)[name]) for name, p in weights(whole).items()), "the training differs"
    assert not differing(whole, again) and len(numbers(whole)) > 1


@pytest.mark.long
@pytest.mark.parametrize("mode", ["watch", "simple", "attribution"])
def test_train(tiny_policy, tmp_path, mode) -> None:
    def run(folder: Path, steps: int, resume: bool) -> Path:
        small = {"prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_length": 4}
        config = tiny_train_config(
            tiny_policy, folder, training={"steps": steps, "save_every": 2}, rollouts=small,
            entropy_probe={**SMALL, "mode": mode},
        )  # fmt: skip
        return run_training(config, quiet=True, resume=resume)

    whole = run(tmp_path / "whole", 5, False)
    run(tmp_path / "again", 4, False)
    again = run(tmp_path / "again", 5, True)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, again)
    ]
    probed = [
        {k: v for k, v in row.items() if k.startswith("entropy_probe/") and not k.endswith("/seconds")}
        for row in rows[0]
    ]
    assert any(probed[-1]), "the last step is probed"
    assert probed == [{k: row[k] for k in wanted} for row, wanted in zip(rows[1], probed, strict=True)]


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "probe", "word"),
    [
        (lambda path: path.unlink(), {}, "holds no record of the probe's averages"),
        (damaged, {}, "not those that were written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), {}, "cannot be read"),
        (lambda path: path.write_bytes(b"\xff" * 100), {}, "header is too long"),
        (lambda path: path.write_bytes(b""), {}, "cannot be read"),
        (lambda path: None, {"averaging": 0.5}, "it is of averaging=0.75, and here averaging=0.5"),
        (lambda path: None, {"rollouts": "previous_step"}, "it is of rollouts=current"),
        (lambda path: write_state(path, ProbeState(), {}), {}, "it is of averaging=None"),
    ],
)
def test_what_cannot_be_gone_on_from_is_said(tiny_policy, tmp_path, change, probe, word) -> None:
    whole, _ = trainer_of(tiny_policy, tmp_path / "run", {"mode": "simple"}, max_steps=3)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    change(state_path(checkpoint, 0))
    again, callback = trainer_of(tiny_policy, tmp_path / "again", {"mode": "simple", **probe}, max_steps=5)
    with pytest.warns(RuntimeWarning, match=f"{word}.*begin anew"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert len(callback.history) == 1


def test_a_record_of_another_step_or_shape_is_seen(tiny_policy, tmp_path) -> None:
    whole, callback = trainer_of(tiny_policy, tmp_path / "run", {"mode": "simple"}, max_steps=6)
    whole.train()
    settings, parameters = callback._kept._settings, weights(whole)
    reading = (settings, parameters, 0.75, callback._sharing)
    path = state_path(tmp_path / "run" / "checkpoint-3", 0)
    state = read_state(path, *reading)
    assert state.values["step"] == 3 and state.averages["token"].value is not None
    folds = state.averages["token"].value.folds
    assert folds.keys() == parameters.keys()
    one = next(iter(folds))
    for damage, word in (
        (lambda: folds.pop(one), "other trained parameters"),
        (lambda: folds.update({one: torch.full_like(folds[one], torch.nan)}), "not finite"),
        (lambda: folds.update({one: folds[one][:, :1]}), "another shape"),
        (lambda: setattr(state.averages["token"], "weight", -1.0), "not positive"),
    ):
        kept, weight = dict(folds), state.averages["token"].weight
        damage()
        write_state(tmp_path / "x.probe", state, settings)
        with pytest.raises(ValueError, match=word):
            read_state(tmp_path / "x.probe", *reading)
        folds.update(kept)
        state.averages["token"].weight = weight
    callback._kept._loaded = path.parent
    with pytest.warns(RuntimeWarning, match="it is of step 3"):
        callback._kept.begin(5)


class _DiesSaving:
    written: list[str]

    def __init__(self, trainer: Any, error: BaseException) -> None:
        save = trainer._save_rng_state

        def dying(folder: str) -> None:
            save(folder)
            self.written = sorted(path.name for path in Path(folder).iterdir())
            raise error

        trainer._save_rng_state = dying


def test_a_plain_trainer_saves_whole_or_not_at_all(tiny_policy, tmp_path) -> None:
    trainer, _ = trainer_of(tiny_policy, tmp_path / "run", {})
    died = _DiesSaving(trainer, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ResumableError, match="no space left on the disk of .*checkpoint-3"):
        trainer.train()
    assert "optimizer.pt" in died.written and not list((tmp_path / "run").glob("checkpoint-*"))
    (tmp_path / "run" / "checkpoint-2.part" / "checkpoint-2").mkdir(parents=True)  # as a kill leaves it
    again, _ = trainer_of(tiny_policy, tmp_path / "run", {})
    again.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-7",
    ]


def test_a_trainer_that_saves_in_its_own_way_is_left_alone(tiny_policy, tmp_path) -> None:
    trainer = make_trainer(tiny_policy, tmp_path, **SAVING)
    save = trainer._save_checkpoint

    def own(model: Any, trial: Any) -> None:
        save(model, trial)
        (tmp_path / f"checkpoint-{trainer.state.global_step}" / "own.txt").write_text("x")

    trainer._save_checkpoint = own
    attach_entropy_probe(trainer, EntropyProbeConfig(**SMALL), ROWS, console=False)
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "own.txt").exists()
