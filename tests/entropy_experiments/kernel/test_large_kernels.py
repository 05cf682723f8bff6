"""Whole analyses under budgets, interrupted and resumed, stored, restricted, shared by processes, and forecast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entropy_experiments import entropy_runner, fisher_analyzer
from entropy_experiments.entropy_runner import FisherAnalysis, run_fisher_analysis
from entropy_experiments.forecast.forecast import forecast_analysis
from entropy_experiments.kernel import options as kernel_options
from entropy_experiments.kernel.store.kernel_from_stores import kernel_from_stores
from entropy_experiments.kernel.store.preconditioner_file import read_preconditioner
from entropy_experiments.kernel.store.store import GradientStore
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from entropy_experiments.records.record import json_of
from rl_training.configuration import dump_config
from rl_training.errors import UserError
from tests.entropy_experiments.small_analysis import config, whole_config

pytestmark = pytest.mark.long

KERNEL = "entropy_analysis.fisher_kernel."


@pytest.fixture(scope="module")
def plain(small_analysis) -> FisherAnalysis:
    return small_analysis


def kernels(analysis: FisherAnalysis) -> dict[str, torch.Tensor]:
    return load_file(analysis.folder / "kernel.safetensors")


def assert_same(found: FisherAnalysis, expected: FisherAnalysis, tolerance: float = 1e-5) -> None:
    for name, matrix in kernels(expected).items():
        error = (kernels(found)[name] - matrix).norm() / matrix.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"
    a, b = found.numbers.step.attribution.shares, expected.numbers.step.attribution.shares
    assert (a - b).norm() / b.norm() <= tolerance
    again = found.numbers.step.predictions.per_token["rao_blackwell"]
    for part, value in expected.numbers.step.predictions.per_token["rao_blackwell"].items():
        assert again[part].value == pytest.approx(value.value, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("strategy", ["tiles", "disk"])
def test_every_strategy_gives_the_same_analysis(plain, tiny_run, tmp_path, strategy):
    settings = config(f"{KERNEL}strategy={strategy}", f"{KERNEL}disk_budget=1GiB")
    found = run_fisher_analysis(tiny_run, settings, folder=tmp_path / strategy)
    assert_same(found, plain)
    assert not (found.folder / "work").exists(), "what was kept for a resume goes when the results are whole"


def test_analyses_of_real_steps_work_without_kept_rows(tiny_run, tmp_path):
    """Interventions and weightings take gradients by backward passes where rows are not kept."""
    switches = ("entropy_analysis.analysis.fresh_scales=[]", "entropy_analysis.analysis.intervention_subsets=4")
    kept = run_fisher_analysis(tiny_run, whole_config(*switches), folder=tmp_path / "kept")
    anew = run_fisher_analysis(tiny_run, whole_config(*switches, f"{KERNEL}strategy=tiles"), folder=tmp_path / "anew")
    a, b = (json_of(x.summary)["analyses"]["intervention"] for x in (kept, anew))
    assert not anew.failed_analyses
    assert a["subsets"] == b["subsets"]
    assert b["measured"] == pytest.approx(a["measured"], rel=2e-2, abs=2e-6)


def test_gradients_are_stored_beside_the_results(plain, tiny_run, tmp_path):
    settings = config(f"{KERNEL}save_gradients=true", f"{KERNEL}disk_budget=100MB", f"{KERNEL}gradient_dtype=bfloat16")
    found = run_fisher_analysis(tiny_run, settings, folder=tmp_path / "stored")
    store = GradientStore.open(found.folder / "gradients")
    assert store.is_complete() and store.layout.num_grads == 16 and store.layout.base_dtype == "bfloat16"
    check = next(c for c in found.numbers.checks if c.name == "gradient store: rounding")
    assert 0 < check.value < 0.01 and check.passed
    assert_same(found, plain, tolerance=0.02)
    p, _ = read_preconditioner(found.folder)
    for side, matrix in (("evaluation", "fisher"), ("entropy", "entropy_fisher")):
        again = kernel_from_stores(GradientStore.open(found.folder / f"gradients_{side}"), store, p, 2**26)
        reference = kernels(found)[matrix]
        assert (again - reference).norm() / reference.norm() < 0.02, matrix


def test_rows_of_some_modules_and_what_they_leave_out(plain, tiny_run, tmp_path):
    """The kernel is that of the chosen modules; predictions and shares are still those of the whole step."""
    found = run_fisher_analysis(tiny_run, config(f"{KERNEL}filter_modules=['*q_proj*']"), folder=tmp_path / "some")
    assert not torch.allclose(kernels(found)["fisher"], kernels(plain)["fisher"])
    again = found.numbers.step.predictions.per_token["rao_blackwell"]
    for part, value in plain.numbers.step.predictions.per_token["rao_blackwell"].items():
        assert again[part].value == pytest.approx(value.value, rel=1e-3, abs=1e-7)
    torch.testing.assert_close(
        found.numbers.step.attribution.shares, plain.numbers.step.attribution.shares, rtol=1e-3, atol=1e-8
    )
    left_out = found.numbers.step.predictions.left_out
    assert left_out is not None and found.summary.kernel_modules.left_out_share == left_out
    assert found.summary.kernel_modules.parameters < found.summary.kernel_modules.trainable
    assert plain.summary.kernel_modules.left_out_share is None
    with pytest.raises(UserError, match="filter_modules: 'nothing' matches none"):
        run_fisher_analysis(tiny_run, config(f"{KERNEL}filter_modules=['nothing']"), folder=tmp_path / "none")


def test_a_sketch_says_how_far_off_it_is(plain, tiny_run, tmp_path):
    found = run_fisher_analysis(
        tiny_run, config(f"{KERNEL}projection_dim=400"), folder=tmp_path / "sketch", keep_going=True
    )
    check = next(c for c in found.numbers.checks if c.name == "sketch: error of the kernel")
    exact, sketched = kernels(plain)["fisher"], kernels(found)["fisher"]
    assert check.value == pytest.approx(float((sketched - exact).norm() / exact.norm()), rel=1e-3)
    assert 0 < check.value < 1
    again = found.numbers.step.predictions.per_token["rao_blackwell"]
    for part, value in plain.numbers.step.predictions.per_token["rao_blackwell"].items():
        assert again[part].value == pytest.approx(value.value, rel=1e-3, abs=1e-7)
    torch.testing.assert_close(
        found.numbers.step.attribution.shares, plain.numbers.step.attribution.shares, rtol=1e-3, atol=1e-8
    )
    with pytest.raises(UserError, match="projection_dim keeps sketches"):
        run_fisher_analysis(
            tiny_run, config(f"{KERNEL}projection_dim=8", f"{KERNEL}strategy=tiles"), folder=tmp_path / "no"
        )


def test_budgets_too_small_are_refused_and_leave_nothing(tiny_run, tmp_path):
    with pytest.raises(UserError, match="memory budget .* too small for one row"):
        run_fisher_analysis(tiny_run, config(f"{KERNEL}memory_budget=1MB"), folder=tmp_path / "no")
    with pytest.raises(UserError, match="gradient store takes .* disk_budget"):
        run_fisher_analysis(tiny_run, config(f"{KERNEL}save_gradients=true"), folder=tmp_path / "no")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_analysis_is_gone_on_with(plain, tiny_run, tmp_path, monkeypatch):
    """Stopped after the kernels: buffers and blocks are read, not made again, and the kernels have the same bits."""
    target = tmp_path / "one"
    measure = fisher_analyzer.measure_scales

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fisher_analyzer, "measure_scales", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fisher_analysis(tiny_run, config(), folder=target)
    assert not target.exists() and UnfinishedWork(tmp_path / "one.part").begun
    monkeypatch.setattr(fisher_analyzer, "measure_scales", measure)
    with pytest.raises(UserError, match="unfinished work .*--resume, or start anew with --overwrite"):
        run_fisher_analysis(tiny_run, config(), folder=target)
    with pytest.raises(UserError, match=r"another analysis \(config.seed was 0, now it is 1\)"):
        run_fisher_analysis(tiny_run, config("seed=1"), folder=target, resume=True)
    with pytest.raises(UserError, match="checkpoint.path"):
        run_fisher_analysis(tiny_run / "checkpoint-2", config(), folder=target, resume=True)
    assert UnfinishedWork(tmp_path / "one.part").begun, "a refusal throws nothing away"

    def no_draw(*_: object) -> None:
        raise AssertionError("buffers and plan were kept")

    monkeypatch.setattr(entropy_runner, "draw_buffers", no_draw)
    monkeypatch.setattr(kernel_options, "plan_kernel", no_draw)  # blocks were cut by the plan that was kept
    made: list[str] = []
    monkeypatch.setattr(UnfinishedWork, "write", lambda self, matrix, piece, block: made.append(piece))
    found = run_fisher_analysis(tiny_run, config(), folder=target, resume=True)
    assert made == [] and not (tmp_path / "one.part").exists()
    assert all(torch.equal(kernels(found)[name], matrix) for name, matrix in kernels(plain).items())
    assert found.summary.predicted == plain.summary.predicted


def _launch(arguments: list[str], processes: int, cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "entropy_experiments"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        start += ["-m", "entropy_experiments"]
    return subprocess.Popen(
        [*start, "analyze", "--trust", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
    )


def test_the_command_killed_and_resumed_by_two_processes(plain, tiny_run, tmp_path):
    """As typed: killed with SIGKILL once blocks lie there, resumed by two processes of one launch."""
    (tmp_path / "analysis.yaml").write_text(dump_config(config(f"{KERNEL}strategy=tiles", f"output_dir={tmp_path}")))
    arguments = [str(tiny_run), "--config", str(tmp_path / "analysis.yaml")]
    first = _launch(arguments, 1, tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("analysis_*/*.part/work/evaluation/*.npz")) and first.poll() is None:
        assert time.monotonic() < deadline, "no block within two minutes"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = _launch([*arguments, "--resume"], 2, tmp_path)
    output, errors = second.communicate(timeout=280)
    assert second.returncode == 0, errors[-3000:]
    assert len(output.split()) == 1, "the report's path, printed once"
    folder = Path(output.strip()).parent
    found = load_file(folder / "kernel.safetensors")
    for name, matrix in kernels(plain).items():
        assert (found[name] - matrix).norm() / matrix.norm() <= 1e-5, name


def test_a_dry_run_plans_and_writes_nothing(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forecast = forecast_analysis(tiny_run, config())
    assert not list(tmp_path.iterdir())
    content = forecast.to_json()
    assert json.loads(json.dumps(content)) == content
    assert content["seconds"] == pytest.approx(sum(s["seconds"] for s in content["stages"]), abs=0.01)
    assert content["plan"]["strategy"] == "memory" and content["plan"]["passes"] == 32
    names = [stage["name"] for stage in content["stages"]]
    assert "evaluation gradients and kernels" in names and "analysis: intervention" not in names
    without = [s.name for s in forecast_analysis(tiny_run, config(f"{KERNEL}compute_full=false")).stages]
    assert "predictions, along the step and its parts" in without and "evaluation gradients and kernels" not in without
    tiles = forecast_analysis(tiny_run, config(f"{KERNEL}strategy=tiles"))
    assert tiles.plan.strategy == "tiles" and tiles.disk == 2 * 4 * (16 * 16 + 16 * 16)
    stored = forecast_analysis(tiny_run, config(f"{KERNEL}save_gradients=true", f"{KERNEL}disk_budget=1GiB"))
    passes = {stage.name: stage.passes for stage in stored.stages}
    assert passes["storing the evaluation gradients"] == 16, "both kinds of rows come from one pass"
    lines = "\n".join(forecast.lines())
    assert "peak memory" in lines and "in all" in lines


def test_a_dry_run_knows_sequences_of_ones_own(tiny_run, tmp_path):
    """Their numbers and lengths; nothing is drawn for them."""
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": f"{k}0 + {k}0 =", "completion": f"{k + j}"} for k in range(4) for j in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = "entropy_analysis.sampling."
    rows = forecast_analysis(tiny_run, config(f"{sampling}eval_sequences_path={path}"))
    seconds = {stage.name: stage.seconds for stage in rows.stages}
    passes = {stage.name: stage.passes for stage in rows.stages}
    assert seconds["drawing the evaluation buffer"] == 0.0 < seconds["drawing the training buffer"]
    assert passes["token statistics"] == 12 and rows.plan.passes == 12 + 16
    columns = forecast_analysis(tiny_run, config(f"{sampling}train_sequences_path={path}"))
    seconds = {stage.name: stage.seconds for stage in columns.stages}
    assert seconds["drawing the training buffer"] == 0.0 < seconds["drawing the evaluation buffer"]
    assert columns.plan.passes == 16 + 12 and columns.n_train == 12


def test_ten_thousand_by_ten_thousand_is_planned_and_its_tiles_run_inside_eight_gib():
    done = subprocess.run(
        [sys.executable, "-m", "tests.entropy_experiments.large_kernel_script"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert 5_000_000 < found["parameters"] < 6_000_000
    assert found["plan"]["strategy"] == "tiles" and 100 < found["plan"]["tile"] < 400
    assert found["plan"]["passes"] == 10_000 + -(-10_000 // found["plan"]["tile"]) * 10_000
    assert found["peak"] < 8 * 2**30, f"{found['peak'] / 2**30:.2f} GiB"
    assert found["error"] < 1e-5
