"""An analysis of a model that is cut over processes: the results of the whole model, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.forecast.forecast import forecast_analysis
from entropy_experiments.sweep.config import SweepConfig
from rl_training.configuration import load_config
from rl_training.errors import ShareDone, UserError
from rl_training.train import run_training
from tests.entropy_experiments.small_analysis import config, whole_config
from tests.shared_artefacts import made_once
from tests.tiny_policy import save_tiny_policy, tiny_train_config
from tests.two_processes import in_two_processes

CUT = "checkpoint.sharding=fsdp2"
# Sixteen sequences of a side, in tiles of a few.
TILES = ("entropy_analysis.fisher_kernel.strategy=tiles", "entropy_analysis.analysis.prompt_structure=false")
STEP = "entropy_analysis.fisher_kernel.preconditioning=step"
ROUNDED, DIFFERENCES = 1e-3, 1e-2
"""Relative. Differences of two nearly equal changes, and their z, are a hundredth of these, of scores in float32; a part that was
left out of a sum over parameters would change either by a third and more.
"""
DIRECTIONS = "entropy_analysis.fisher_kernel.compute_full=false"


def _analysed(settings: Any) -> None:
    """One analysis by all processes of the group, as a launcher would start it."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    folder = Path(os.environ["CUT_RESULTS"])
    try:
        run_fisher_analysis(os.environ["CUT_RUN"], settings, folder=folder, overwrite=True, trust=True)
    except ShareDone:
        assert dist.get_rank() > 0


def whole_cut() -> None:
    _analysed(whole_config(CUT))


def tiles_cut() -> None:
    _analysed(config(CUT, STEP, *TILES))


def directions_cut() -> None:
    _analysed(config(CUT, DIRECTIONS))


def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, work: Any, size: int) -> Path:
    folder = tmp_path / "cut"
    monkeypatch.setenv("CUT_RESULTS", str(folder))
    monkeypatch.setenv("CUT_RUN", str(run))
    assert in_two_processes(work, size) == [None] * size
    return folder


def _numbers(found: Any, at: str = "") -> dict[str, Any]:
    if isinstance(found, dict):
        return {k: v for key, value in found.items() for k, v in _numbers(value, f"{at}/{key}").items()}
    if isinstance(found, list):
        return {k: v for place, value in enumerate(found) for k, v in _numbers(value, f"{at}/{place}").items()}
    return {at: found}


def assert_same_results(found: Path, expected: Path, tolerance: float) -> None:
    """All that summary.json says. Degrees of freedom and p of differences that are 0 but for rounding are of no account."""
    if (expected / "kernel.safetensors").exists():
        kernels = load_file(expected / "kernel.safetensors")
        for name, kernel in load_file(found / "kernel.safetensors").items():
            assert (kernel - kernels[name]).norm() < 1e-5 * kernels[name].norm(), name
    one, two = (_numbers(json.loads((folder / "summary.json").read_text())) for folder in (expected, found))
    assert one.keys() == two.keys()
    off = {}
    for name, value in one.items():
        rounded = name.endswith(("degrees_of_freedom", "p_value", "closure")) or "/tokens/" in name
        if isinstance(value, float) and not rounded:
            # Differences of two nearly equal numbers, and what is made of them, have the rounding of these.
            subtracted = "/agreement/" in name or "/comparisons/" in name
            share, least = (DIFFERENCES, 1e-6) if subtracted else (tolerance, 1e-8)
            if two[name] is None or abs(two[name] - value) > share * max(abs(value), abs(two[name])) + least:
                off[name] = (value, two[name])
        elif not isinstance(value, float) and two[name] is not None:
            assert two[name] == value, name
    assert not off


@pytest.fixture
def rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut model has every completion in a row of its own. The whole one too then: in float32 a z near 3 has another 3% of
    rounding where its gradient is summed in another order (and is 10% from that in float64 either way).
    """
    monkeypatch.setattr(PrefixSharing, "shares", lambda self, batch: False)


@pytest.mark.long
@pytest.mark.usefixtures("rounded_alike")
def test_two_processes_with_a_part_each_give_the_analysis_of_the_whole(tiny_run, tmp_path, monkeypatch):
    whole = run_fisher_analysis(tiny_run, whole_config(), folder=tmp_path / "whole", trust=True)
    found = _results(tmp_path, monkeypatch, tiny_run, whole_cut, 2)
    assert_same_results(found, whole.folder, ROUNDED)
    record = json.loads((found / "run.json").read_text())
    assert record["processes"] == 2 and all(check["passed"] for check in record["self_checks"])
    assert record["failed_analyses"] == {}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    """Two steps in which every weight of the tiny policy is trained."""

    def train(root: Path) -> Path:
        policy = save_tiny_policy(root / "policy")
        settings = tiny_train_config(policy, root / "run", lora={"enabled": False}, optimizer={"learning_rate": 1e-4})
        return run_training(settings, quiet=True)

    return made_once(tmp_path_factory, "fully_trained", train)


@pytest.mark.long
@pytest.mark.usefixtures("rounded_alike")
@pytest.mark.parametrize("run", ["tiny_run", "full_run"])
def test_three_processes_in_tiles(request, run, tmp_path, monkeypatch):
    path = request.getfixturevalue(run)
    whole = run_fisher_analysis(path, config(STEP, *TILES), folder=tmp_path / "whole", trust=True)
    assert_same_results(_results(tmp_path, monkeypatch, path, tiles_cut, 3), whole.folder, ROUNDED)


@pytest.mark.long
@pytest.mark.usefixtures("rounded_alike")
def test_without_a_matrix_derivatives_are_differences(full_run, tmp_path, monkeypatch):
    whole = run_fisher_analysis(full_run, config(DIRECTIONS), folder=tmp_path / "whole", trust=True)
    assert_same_results(_results(tmp_path, monkeypatch, full_run, directions_cut, 2), whole.folder, ROUNDED)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint.device_map=auto", "checkpoint.device=auto"], "leave one of them out"),
        (["entropy_analysis.fisher_kernel.save_gradients=true"], "leave out fisher_kernel's save_gradients"),
        (["entropy_analysis.fisher_kernel.disk_budget=1GiB"], "leave out fisher_kernel's strategy=disk"),
        (["entropy_analysis.fisher_kernel.projection_dim=8"], "leave out fisher_kernel's projection_dim"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        config(CUT, *overrides)


@pytest.mark.long
def test_one_process_cannot_cut_a_model(tiny_run, tmp_path):
    with pytest.raises(UserError, match="torchrun --nproc-per-node N"):
        run_fisher_analysis(tiny_run, config(CUT), folder=tmp_path / "no", trust=True)
    with pytest.raises(UserError, match="add --devices N"):
        forecast_analysis(tiny_run, config(CUT), trust=True)
    with pytest.raises(UserError, match="one by one"):
        load_config(SweepConfig, None, [CUT])
    assert not (tmp_path / "no").exists()


def test_moments_of_a_stretch_are_those_rows(tiny_run):
    moments = load_checkpoint(tiny_run).optimizer
    assert moments is not None
    name = next(iter(moments))
    whole = moments[name]
    part = {name: whole.exp_avg[1:3]}
    own = moments.of_stretches(part, {name: slice(1, 3)})[name]
    assert own.exp_avg.equal(whole.exp_avg[1:3]) and own.exp_avg_sq.equal(whole.exp_avg_sq[1:3])
    assert (own.step, own.lr, own.beta1) == (whole.step, whole.lr, whole.beta1)
    assert moments[name].exp_avg.equal(whole.exp_avg), "the whole stays as it was"
