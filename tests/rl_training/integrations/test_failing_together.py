"""What one process cannot do, none does: no process is left waiting, and no number of one's goes into another's sum."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entropy_core.batch import length_buckets
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.processes import Processes
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.failing_together import FailingTogether, OtherProcessFailedError
from rl_training.integrations.probe_checkpoint import ProbeCheckpoint, Probed
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.premises.surprisal_check import SamplerWatch
from rl_training.probe.probe_state import ProbeState, state_path, write_state
from rl_training.train import _save_last
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_core.shared_work import VOCABULARY, five_prompts
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.two_processes import in_two_processes

CPU = torch.device("cpu")
ROWS = [{"prompt": f"{a}-{b}="} for a in range(5) for b in range(4)]


class Broken(ValueError):
    pass


def _exchanges(sharing: Processes, failing: int | None) -> None:
    """A few of every kind; before exchange number `failing` something breaks."""
    calls = (
        lambda: sharing.sum(torch.ones(3)),
        lambda: sharing.gather(["a"] * (1 + sharing.rank)),
        lambda: sharing.any(False, CPU),
        lambda: sharing.from_root(lambda: "made"),
        lambda: None,
    )
    for number, call in enumerate(calls):
        if number == failing:
            raise Broken(number)
        call()


def _a_failure_of_each_at_every_moment() -> list[tuple[str, float]]:
    fate, out = FailingTogether(CPU), []
    rank = fate.processes.rank
    for whose in range(fate.processes.size):
        for moment in range(5):
            try:
                with fate.together():
                    _exchanges(fate.processes, moment if rank == whose else None)
                ended = "well"
            except (Broken, OtherProcessFailedError) as error:
                ended = type(error).__name__
            # What comes next is of all of them again: gradients, for example.
            out.append((ended, float(Processes.world().sum(torch.tensor(10.0**rank)))))
    with fate.together():
        _exchanges(fate.processes, None)
    out.append(("well", float(Processes.world().sum(torch.tensor(10.0**rank)))))
    return out


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_failure_in_one_process_is_one_in_all(size: int) -> None:
    total = float(sum(10**rank for rank in range(size)))
    for rank, found in enumerate(in_two_processes(_a_failure_of_each_at_every_moment, size, patience=30)):
        ends = ["Broken" if rank == whose else "OtherProcessFailedError" for whose in range(size) for _ in range(5)]
        assert found == [(end, total) for end in [*ends, "well"]]


def _swallowed() -> list[str]:
    """Someone inside takes the other's failure for his own trouble and goes on: the block fails all the same."""
    fate = FailingTogether(CPU)
    try:
        with fate.together():
            if fate.processes.rank == 1:
                raise Broken
            for _ in range(2):
                try:
                    fate.processes.sum(torch.ones(1))
                except Exception:  # noqa: S112 - what is tested
                    continue
    except (Broken, OtherProcessFailedError) as error:
        return [type(error).__name__, str(float(Processes.world().sum(torch.ones(1))))]
    return []


def test_another_ones_failure_cannot_be_gone_on_from() -> None:
    assert in_two_processes(_swallowed, patience=30) == [["OtherProcessFailedError", "2.0"], ["Broken", "2.0"]]


def test_gathered_items_keep_the_order_of_ranks() -> None:
    assert Processes().gather([1, 2]) == [1, 2]
    assert in_two_processes(_gathered, 3, patience=30) == [[0, 10, 20, 21, 22]] * 3


def _gathered() -> list[int]:
    sharing = Processes.world()
    return sharing.gather([10 * sharing.rank + k for k in range((1, 1, 3)[sharing.rank])])


# ------------------------------------------------------------------ a trainer's probe
def _train_while_one_renders_otherwise() -> dict[str, Any]:
    rank, size = int(torch.distributed.get_rank()), torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    policy, folder = os.environ["FATE_FOLDERS"].split(os.pathsep)
    settings = {"per_device_train_batch_size": 8, "loss_type": "dr_grpo", "learning_rate": 1e-4}
    trainer = make_trainer(Path(policy), Path(folder) / "run", **settings)
    config = EntropyProbeConfig(eval_sequences=8, rollouts="pool", measure_every=1, predict_every=None)
    callback = attach_entropy_probe(trainer, config, ROWS, console=False)
    assert trainer.accelerator.num_processes == size
    if rank == 1:  # its first prompts alone have something that the template makes another text of
        callback._first_prompts.require_ours = _refuse
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])
    off = [str(w.message) for w in said if "is off from here on" in str(w.message)]
    return {"steps": trainer.state.global_step, "off": off, "weights": weights, "history": len(callback.history)}


def _refuse() -> None:
    raise Broken("the first prompts of this process were rendered otherwise")


@pytest.mark.long
def test_a_probe_that_one_process_turns_off_is_off_in_all(tiny_policy, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FATE_FOLDERS", os.pathsep.join(map(str, (tiny_policy, tmp_path))))
    first, second = in_two_processes(_train_while_one_renders_otherwise, patience=40)
    for found, words in ((first, "another process failed"), (second, "rendered otherwise")):
        assert found["steps"] == 3 and found["history"] == 0
        assert len(found["off"]) == 1 and words in found["off"][0]
    assert torch.equal(first["weights"], second["weights"]), "the policy is one"


# ------------------------------------------------------------------ a probe's record in a checkpoint
class Remembered:
    """Stands for WatchedSequences and for the probe."""

    def __init__(self) -> None:
        self.known = "nothing"

    def state(self) -> tuple[dict, dict]:
        return {}, {"known": self.known}

    def load(self, *state: Any) -> None:
        if isinstance(state[0], dict):
            self.known = state[1]["known"]

    def reset(self) -> None: ...


def _resumed(kind: str) -> list[Any]:
    """Process 1's record is not there, or is damaged behind what was read of it before."""
    sharing, folder = Processes.world(), Path(os.environ["FATE_FOLDERS"])
    model, batch = DistanceAttention(VOCABULARY).double(), five_prompts()
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2, process_index=sharing.rank, device=CPU),
        args=SimpleNamespace(),
        _save_rng_state=lambda *_: None,
        _load_optimizer_and_scheduler=lambda *_: None,
    )
    layout, sequences, probe = PrefixSharing(model, sharing), Remembered(), Remembered()
    probe.folds = 1
    config = EntropyProbeConfig(rollouts="pool")
    sampler = SamplerWatch(trainer)
    kept = ProbeCheckpoint(trainer, config, Probed(model, probe, sequences, sampler, (layout,)), sharing)
    values = {"step": 3, "carried": [], "layouts": [[True, 100]], "sampler": [5, 8, True, 0.5, 0.25, 7]}
    if kind == "damaged" and sharing.rank == 1:
        values["sampler"] = "?"
    path = state_path(folder, sharing.rank)
    if kind == "damaged" or sharing.rank == 0:
        write_state(path, ProbeState({}, 0, None, {}, values), kept._settings)
    trainer._load_optimizer_and_scheduler(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept.begin(3)
    found = [layout.state(), sampler.state(), sequences.known]
    layout.buckets(batch)  # an exchange in every process, or in none
    return [*found, float(sharing.sum(torch.tensor(10.0**sharing.rank)))]


def _resumed_without_one() -> list[Any]:
    return _resumed("missing")


def _resumed_from_a_damaged_one() -> list[Any]:
    return _resumed("damaged")


@pytest.mark.parametrize("function", [_resumed_without_one, _resumed_from_a_damaged_one])
def test_a_record_that_one_process_cannot_read_teaches_none(function, tmp_path, monkeypatch) -> None:
    """Else one lays out rows by what it remembers, and the other asks all how to."""
    monkeypatch.setenv("FATE_FOLDERS", str(tmp_path))
    for found in in_two_processes(function, patience=20):
        assert found == [[None, 0], [0, 1, False, 0.0, 0.0, 0], "nothing", 11.0]


# ------------------------------------------------------------------ the last checkpoint
def _saved_last() -> int:
    """Each process has a disk of its own, and the Trainer has saved the last step onto the first one's."""
    rank, saved = torch.distributed.get_rank(), []
    folder = Path(os.environ["FATE_FOLDERS"]) / f"disk-{rank}"
    (folder / ("checkpoint-3" if rank == 0 else "other")).mkdir(parents=True)

    def save(model: Any, trial: Any) -> None:
        saved.append(torch.distributed.barrier())

    _save_last(SimpleNamespace(state=SimpleNamespace(global_step=3), model=None, _save_checkpoint=save), folder)
    return len(saved)


def test_the_last_checkpoint_is_saved_by_all_or_by_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FATE_FOLDERS", str(tmp_path))
    assert in_two_processes(_saved_last, patience=20) == [0, 0]


def test_rows_are_laid_out_by_what_is_remembered() -> None:
    """The test above is not blind: a layout that knows asks nobody."""
    layout = PrefixSharing(DistanceAttention(VOCABULARY).double(), Processes())
    layout.load([False, 0])
    assert layout.buckets(five_prompts()) is length_buckets
