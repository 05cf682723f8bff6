"""What processes of a launch find on disk or in memory may differ: the first one's answer counts, and none waits for another."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from entropy_core.cut_weights import cut_on_paper
from entropy_core.processes import Processes
from entropy_experiments import entropy_runner
from entropy_experiments.analyses.registry import run_analyses
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.kernel.engine import KernelEngine
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_experiments.analyses.test_analyses_runner import replace_runs, stub_inputs
from tests.two_processes import in_two_processes


class _Seen(Exception):
    pass


def _opened() -> tuple[str, str]:
    """(checkpoint, what the first process says next), where the analysis opens its checkpoint."""
    launch = Processes.world()
    entropy_runner.join_launch = lambda **_: launch
    entropy_runner.check_trust = lambda *_: None

    def opened(path: Path, *_: Any) -> Any:
        raise _Seen(path.name, launch.from_root(lambda: "the first one's"))

    entropy_runner.opened_checkpoint = opened
    run, results = Path(os.environ["ONE_ANSWER"]), Path(os.environ["ONE_ANSWER"]) / f"disk-{launch.rank}" / "results"
    if launch.rank == 0:
        results.mkdir(parents=True)
        (results / "run.json").write_text("{}")
    dist.barrier()
    if launch.rank == 1:  # comes later: meanwhile training has saved another checkpoint
        time.sleep(1.0)
        (run / "checkpoint-2").mkdir()
        (run / "checkpoint-2" / "trainer_state.json").write_text("{}")
    os.chdir(results.parent if results.parent.is_dir() else run)
    try:
        run_fisher_analysis(run, FisherAnalysisConfig(), folder="results", overwrite=True)
    except _Seen as seen:
        return seen.args
    return ("", "")


def test_all_analyse_one_checkpoint_and_hear_the_answer_to_their_own_question(tmp_path, monkeypatch) -> None:
    """The latest checkpoint of a run that trains on is another a second later; a results folder lies on one disk."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    monkeypatch.setenv("ONE_ANSWER", str(tmp_path))
    assert in_two_processes(_opened, patience=20) == [("checkpoint-1", "the first one's")] * 2


# ------------------------------------------------------------------ a plan that one process must give up
@dataclass(frozen=True)
class _Setup:
    """As much of a KernelSetup as settling takes."""

    plan: Any
    passes: Any
    processes: Processes
    without_factors: Any
    batch: Any = None


def _settled() -> list[Any]:
    processes = Processes.world()
    formation = SimpleNamespace(looping=processes.rank == 1)  # it had no memory for the factors
    passes = SimpleNamespace(formation=formation, settle=lambda *_, **__: None)

    def without() -> Any:
        return processes.from_root(lambda: SimpleNamespace(strategy="tiles"))

    engine = KernelEngine(_Setup(SimpleNamespace(strategy="factored"), passes, processes, without))
    engine.settle(None)
    return [engine.setup.plan.strategy, float(processes.sum(torch.ones(1)))]


def test_processes_plan_anew_together() -> None:
    assert in_two_processes(_settled, patience=20) == [["tiles", 2.0]] * 2


def test_a_plan_is_kept_where_none_has_to_give_it_up() -> None:
    passes = SimpleNamespace(formation=SimpleNamespace(looping=False), settle=lambda *_, **__: None)
    setup = _Setup(SimpleNamespace(strategy="factored"), passes, Processes(), pytest.fail)
    for given in (setup, replace(setup, without_factors=None)):
        engine = KernelEngine(given)
        engine.settle(None)
        assert engine.setup is given


# ------------------------------------------------------------------ an analysis that fails in one process of a cut model
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("out of memory")])
def test_what_one_process_of_a_cut_model_meets_ends_it(monkeypatch, error) -> None:
    """The others are still in that analysis: its passes would be taken for those of the next one."""

    def full(inputs: Any) -> None:
        raise error

    replace_runs(monkeypatch, {"attribution": full})
    assert list(run_analyses(stub_inputs()).failed()) == ["attribution"]
    with cut_on_paper(DistanceAttention(11), 2), pytest.raises(type(error)):
        run_analyses(stub_inputs())


def test_what_all_processes_of_a_cut_model_meet_is_named(monkeypatch) -> None:
    def refused(inputs: Any) -> None:
        raise ValueError("too few prompts")

    replace_runs(monkeypatch, {"attribution": refused})
    with cut_on_paper(DistanceAttention(11), 2):
        assert list(run_analyses(stub_inputs()).failed()) == ["attribution"]
