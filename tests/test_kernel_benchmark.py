"""The kernel benchmark's own arithmetic: its report on recorded lines, its FLOP counts, its reference. No peers needed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from entropy_core.passes.frozen_head import _PROBE_TOKENS
from entropy_core.passes.settings import PassSettings

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def line(name, turn, wall, n_rows=16, n_columns=32, **fields):
    return {
        "case": "tiny-512", "n_rows": n_rows, "n_columns": n_columns, "device": "cpu", "threads": 2, "turn": turn,
        "implementation": name, "wall_s": wall, "cpu_s": 2 * wall, "base_mib": 400.0, "peak_mib": 400.0 + 100 * wall,
        "added_mib": 100 * wall, **fields,
    }  # fmt: skip


def recorded():
    """Three turns at three sizes. The machine is twice as slow in the second turn; ours takes 0.02 s + 5 ms a sequence."""
    lines = []
    for n_rows, n_columns in ((16, 32), (32, 64), (64, 128)):
        n = n_rows + n_columns
        for turn, slowness in enumerate((1.0, 2.0, 1.0)):
            plain, ours = 0.004 * n * slowness, (0.02 + 0.005 * n) * (1.0 if turn != 1 else 2.0)
            lines += [
                line("plain", turn, plain, n_rows, n_columns),
                line("plain_walk", turn, plain / 4, n_rows, n_columns),
                line("ours", turn, ours, n_rows, n_columns, relative_error=1e-6, right=True),
                line("ours_both", turn, ours + 0.3 * plain, n_rows, n_columns, relative_error=1e-6, right=True),
                line("opacus", turn, 2 * ours, n_rows, n_columns, relative_error=[2e-6, 3e-6, 1e-6][turn], right=True),
                line("bergson", turn, 3 * ours, n_rows, n_columns, relative_error=0.4, right=False),
            ]
        lines.append({**line("dattri", 0, 1.0, n_rows, n_columns), "failed": "the process ended with status -9"})
    return lines


ENVIRONMENT = {
    "threads": 2, "device": "cpu", "hardware": {"processor": "a processor"}, "versions": {"opacus": "1.6.0", "traker": None},
}  # fmt: skip


def test_ratios_are_taken_within_a_turn(load):
    rows = {(r.name, r.n): r for r in load("kernel_report").summarize(recorded())}
    ours = rows["ours", 48]
    assert ours.wall == pytest.approx(0.26)
    assert ours.of_plain == pytest.approx(0.26 / 0.192), "a turn in which everything was slow must not move the ratio"
    assert ours.of_plain_cpu == pytest.approx(0.26 / 0.192)
    assert rows["opacus", 48].of_ours == pytest.approx(2.0)
    assert rows["opacus", 48].error == 3e-6, "the worst turn's error counts"
    assert rows["bergson", 48].wrong and not ours.wrong
    assert rows["dattri", 48].failed and rows["plain", 48].of_plain == 1.0


def test_linear_fit(load):
    report = load("kernel_report")
    ours = [r for r in report.summarize(recorded()) if r.name == "ours"]
    fit = report.linear_fit(ours)
    assert (fit.start, fit.each) == (pytest.approx(0.02), pytest.approx(0.005)) and fit.worst < 1e-9
    assert report.linear_fit(ours[:2]) is None
    bent = [report.Row("c", n, 0, "ours", 1, wall=wall) for n, wall in ((1, 1.0), (2, 2.0), (3, 6.0))]
    # least squares of 1, 2, 6: slope 2.5, start -2; the first point is off by 0.5 of 1
    assert report.linear_fit(bent).worst == pytest.approx(0.5)


def test_report_from_recorded_lines(load, tmp_path):
    (tmp_path / "measurements.jsonl").write_text("".join(json.dumps(one) + "\n" for one in recorded()))
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    load("kernel_report").main(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| ours, K1 | 3 | 0.260 | 0.520 | 1.35 (1.35) | 1.00 | 426 (+26) | 1.0e-06 |" in text
    assert (
        text.count("KH on top of K1: 0.30 of the plain pass; one more plain walk back over the evaluation side: 0.25.")
        == 3
    )
    assert "4.0e-01 **wrong**" in text
    assert "dattri, 16 x 32, tiny-512: the process ended with status -9" in text
    assert "0.020 s + 5.00 ms n" in text and "opacus 1.6.0" in text and "traker" not in text
    for name in ("time.png", "memory.png", "peers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_of_one_size_and_of_nothing(load, tmp_path):
    report = load("kernel_report")
    (tmp_path / "measurements.jsonl").write_text(
        json.dumps(line("ours", 0, 1.0, relative_error=1e-6, right=True)) + "\n"
    )
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    report.main(tmp_path)
    assert "nan" not in (tmp_path / "README.md").read_text(), "without a plain pass the ratio is left out"
    with pytest.raises(SystemExit, match="make bench-kernel"):
        report.main(tmp_path / "nowhere")


@pytest.mark.parametrize("keys", [2, 4])
def test_counted_flop_are_those_of_a_real_pass(load, keys):
    """Against torch's own counter, which sees every product that the engine really makes."""
    roofline = load("kernel_parts.roofline")
    shape = {**roofline.SHAPES["tiny"], "num_key_value_heads": keys}
    n_rows, n_columns, prompt, completion, rank = 3, 2, 5, 4, 8
    case = roofline.random_case(shape, rank, n_rows, n_columns, prompt, completion, "cpu")
    case.model.get_base_model().set_attn_implementation("eager")
    counted = roofline.kernel_products(shape, rank, n_rows, n_columns, prompt + completion - 1, completion)
    assert roofline.trainable(shape, rank) == sum(p.numel() for p in case.parameters.values())
    # On either side the head is tried on a few tokens, and compared with the product of its weight.
    probe = 2 * 2 * 2 * _PROBE_TOKENS * shape["hidden_size"] * shape["vocab_size"]
    assert sum(p.flop for p in counted) == _flop_of_kernel(case) - probe


def _flop_of_kernel(case):
    """What torch counts in one pass over both sides, their rows and their product; no self-check."""
    from entropy_core.entropy import score_coefficients
    from entropy_core.gradients import gradient_rows
    from entropy_core.passes.state import PassState

    def added(_self_shape, left_shape, right_shape, *_args, out_shape=None, **_kwargs) -> int:
        return mm_flop(left_shape, right_shape)

    in_place = {torch.ops.aten.addmm_: added}
    with PassState(case.model):
        gradient_rows(case.model, case.rows, score_coefficients(case.rows))  # adapters are compared with peft's once
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            rows, columns = (
                gradient_rows(case.model, side, score_coefficients(side), passes=PassSettings(verify=False))
                for side in (case.rows, case.columns)
            )
            for name in rows:
                rows[name].flatten(1) @ columns[name].flatten(1).T
    return counter.get_total_flops()


def test_least_seconds(load):
    roofline = load("kernel_parts.roofline")
    wide = roofline.Product("rows", 2, 10, 20, 30)
    assert wide.flop == 2 * 2 * 10 * 20 * 30 and wide.bytes(4) == 4 * 2 * (200 + 600 + 300)
    assert roofline.least_seconds([wide, wide], flop_rate=1e3, bandwidth=1e9) == {"rows": pytest.approx(48.0)}
    assert roofline.least_seconds([wide], flop_rate=1e9, bandwidth=1e3) == {"rows": pytest.approx(8.8)}


def test_reference_agrees_with_both_kernels(load):
    """Two ways that share no code: the benchmark's float64 loop and the engine."""
    from entropy_core.kernel import compute_kernels

    roofline, reference = load("kernel_parts.roofline"), load("kernel_parts.reference")
    case = roofline.random_case(roofline.SHAPES["tiny"], 4, 3, 4, 6, 5, "cpu")
    found = compute_kernels(case.model, case.rows, case.columns, case.preconditioner)
    expected = reference.reference(case, "tiny")
    error = load("kernel_parts.cases").relative_error
    assert error(found.fisher, expected, "kernel") < 1e-5
    assert error(found.entropy_fisher, expected, "entropy_kernel") < 1e-4
    assert error(2 * found.fisher, expected, "kernel") == pytest.approx(1.0, rel=1e-4)


def test_scores_of_cut_and_whole_logits_agree(load):
    """What peers are given as their loss, with logits everywhere and from the first needed position on."""
    roofline, cases = load("kernel_parts.roofline"), load("kernel_parts.cases")
    case = roofline.random_case(roofline.SHAPES["tiny"], 4, 3, 3, 6, 5, "cpu")
    batch = cases.random_batch(5, 512, 7, prompt=(3, 9), completion=(2, 8))
    for part in cases.parts(batch, token_batch_size=40):
        with torch.no_grad():
            torch.testing.assert_close(cases.score(case.model, part), cases.score(case.model, part, cut=True))


def test_smollm2_without_a_run_is_one_line():
    found = subprocess.run(
        [sys.executable, "benchmarks/kernel.py", "measure", "--cases", "smollm2", "--run", "nowhere"],
        capture_output=True, text=True, cwd=BENCHMARKS.parent, timeout=300,
    )  # fmt: skip
    assert found.returncode == 1 and "nowhere is there" not in found.stdout
    assert "make demo" in found.stderr and "Traceback" not in found.stderr


def test_requirements_are_exact_and_agree_with_the_project():
    """A peer's needs that the project pins too must have the same version: one environment holds both."""
    pins = _pins(BENCHMARKS / "requirements-kernel.txt")
    ours = _pins(BENCHMARKS.parent / "constraints.txt")
    assert not pins.keys() & {"torch", "torchvision", "torchaudio"}
    assert {name: pins[name] for name in pins.keys() & ours.keys()} == {
        name: ours[name] for name in pins.keys() & ours.keys()
    }


def _pins(path):
    lines = [one.split("#")[0].strip() for one in path.read_text().splitlines()]
    assert all("==" in one for one in lines if one)
    return {one.split("==")[0].lower().replace("_", "-"): one.split("==")[1] for one in lines if one}
