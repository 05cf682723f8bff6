"""checkpoint.dtype: float64. Everything is computed with more digits, and rows are kept in float32 as ever."""

import pytest
import torch

from entropy_core.batch import SequenceBatch
from entropy_core.gradients import per_sequence_gradients, trainable_parameters
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_core.passes.settings import PassSettings
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.kernel.options import LOGIT_BYTES, pass_bytes
from tests.entropy_experiments.small_analysis import config, whole_config

pytestmark = pytest.mark.long


def batch(seed: int) -> SequenceBatch:
    tokens = torch.randint(3, 90, (6, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    return SequenceBatch.from_sequences([t[:5] for t in tokens], [t[5:] for t in tokens], list(range(6)), 0)


def test_adapters_and_base_are_loaded_in_float64_and_kernels_have_its_digits(tiny_run):
    kernels, pass_memory = {}, {}
    for dtype in ("float32", "float64"):
        model = load_checkpoint(tiny_run, device="cpu", dtype=dtype).model
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        pass_memory[dtype] = pass_bytes(model, 10**6) - LOGIT_BYTES
        kernels[dtype] = compute_cross_fisher_kernel(model, batch(0), batch(1)).double()
    assert pass_memory["float64"] == 2 * pass_memory["float32"], "plans count numbers of eight bytes"
    rows, columns = (per_sequence_gradients(model, batch(seed), passes=PassSettings(method="loop")) for seed in (0, 1))
    exact = sum(rows[name].flatten(1) @ columns[name].flatten(1).T for name in trainable_parameters(model))
    errors = {dtype: float((found - exact).norm() / exact.norm()) for dtype, found in kernels.items()}
    assert errors["float64"] < 2e-7 < errors["float32"] < 1e-4


def test_every_analysis_runs_in_float64(tiny_run, tmp_path):
    analysis = run_fisher_analysis(tiny_run, whole_config("checkpoint.dtype=float64"), folder=tmp_path / "double")
    assert all(check.passed for check in analysis.numbers.checks)


@pytest.mark.parametrize("strategy", ["memory", "disk", "tiles"])
def test_every_plan_runs_in_float64(tiny_run, tmp_path, strategy):
    plan = [f"entropy_analysis.fisher_kernel.{key}" for key in (f"strategy={strategy}", "disk_budget=1GiB")]
    analysis = run_fisher_analysis(tiny_run, config("checkpoint.dtype=float64", *plan), folder=tmp_path / "double")
    assert all(check.passed for check in analysis.numbers.checks)
    assert analysis.numbers.kernels.fisher.isfinite().all() and analysis.numbers.kernels.fisher.any()
