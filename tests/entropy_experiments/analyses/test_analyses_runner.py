"""All analyses of one checkpoint: each is there, their numbers hang together, and none fails unseen."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from entropy_experiments.analyses import registry as analyses_runner
from entropy_experiments.analyses.adapters import NotApplicable
from entropy_experiments.analyses.attribution import concentration
from entropy_experiments.analyses.registry import ANALYSES, run_analyses
from entropy_experiments.config import AnalysisConfig
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.records.analysis_results import Skipped
from entropy_experiments.records.attribution_results import AttributionResult, Concentrations, SequenceShares
from entropy_experiments.records.reader import RESULTS_FORMAT
from entropy_experiments.records.record import json_of
from entropy_experiments.report.sections import PRESENTATIONS
from rl_training.errors import UserError
from tests.entropy_experiments.small_analysis import config, whole_config

NAMES = [analysis.name for analysis in ANALYSES]


@pytest.fixture(scope="module")
def whole(whole_analysis):
    return whole_analysis


@pytest.fixture(scope="module")
def analyses(whole):
    return json.loads((whole.folder / "summary.json").read_text(), parse_constant=pytest.fail)["analyses"]


@pytest.mark.long
def test_every_token_of_the_training_buffer_has_its_share(whole):
    rows = pq.read_table(whole.folder / "sequences.parquet").to_pylist()
    training = [row for row in rows if row["buffer"] == "training"]
    largest = max(abs(row["delta_h"]) for row in training)
    for row in training:
        assert len(row["token_shares"]) == len(row["token_texts"]) == row["length"]
        assert sum(row["token_shares"]) == pytest.approx(row["delta_h"], rel=1e-3, abs=1e-4 * largest)
        without_special_tokens = re.sub(r" ?<\w+>", "", "".join(row["token_texts"]))
        assert without_special_tokens.strip() == row["completion"].strip()
    assert any(np.ptp(row["token_shares"]) > 0.1 * largest for row in training), "tokens differ"
    evaluation = [row for row in rows if row["buffer"] == "evaluation"]
    assert all(row["token_shares"] is None and len(row["token_texts"]) == row["length"] for row in evaluation)
    assert json.loads((whole.folder / "summary.json").read_text())["format_version"] == RESULTS_FORMAT == 2


def test_every_share_and_effect_has_the_interval_of_its_values_without_each_evaluation_prompt(whole):
    """Shares add up to the batch part of the step, with every prompt left out too."""
    training = [r for r in pq.read_table(whole.folder / "sequences.parquet").to_pylist() if r["buffer"] == "training"]
    for name, short in (("delta_h", "delta_h"), ("effect_of_leaving_out", "effect")):
        assert all(row[f"{short}_low"] <= row[name] <= row[f"{short}_high"] for row in training)
        assert any(row[f"{short}_low"] < row[f"{short}_high"] for row in training)
    left_out = pq.read_table(whole.folder / "leave_one_out.parquet").to_pydict()
    shares = {name: values for name, values in left_out.items() if name.startswith("share.prompt.")}
    assert {int(name.split(".")[-1]) for name in shares} == {row["prompt_index"] for row in training}
    batch = np.array(left_out["predicted.rao_blackwell.batch"])
    np.testing.assert_allclose(np.sum(list(shares.values()), 0), batch, rtol=1e-3, atol=1e-3 * np.abs(batch).max())


def test_effects_of_leaving_out_and_the_training_sides_noise_stand_beside_the_shares(whole):
    summary = json.loads((whole.folder / "summary.json").read_text())
    found, noise = summary["leaving_out"], summary["training_noise"]
    training = [r for r in pq.read_table(whole.folder / "sequences.parquet").to_pylist() if r["buffer"] == "training"]
    effects = np.array([row["effect_of_leaving_out"] for row in training])
    assert effects.sum() == pytest.approx(found["sum_of_effects"], rel=1e-9)
    assert found["headline"] == "effect" and found["own_part_of_second_moment"] == pytest.approx(0.001 / (1 - 0.999**5))
    assert found["sum_of_effects"] != pytest.approx(summary["attribution"]["sum_of_shares"], rel=0.02), (
        "they do not add up"
    )
    for row in found["by_prompt"]:
        own = [r for r in training if r["prompt_index"] == row["prompt_index"]]
        assert row["effect"] == pytest.approx(sum(r["effect_of_leaving_out"] for r in own), rel=1e-9)
        assert row["share"] == pytest.approx(sum(r["delta_h"] for r in own), rel=1e-9) and row["real"] is not None
    first = found["first"]["sequences"]["lowering"]
    assert first["value"] == pytest.approx(effects[first["rows"]].sum(), rel=1e-9) and 0 <= first["first_in"] <= 1
    assert noise["value"] == pytest.approx(summary["predicted"]["rao_blackwell"]["total"]["value"], rel=1e-4)
    assert noise["low"] < noise["value"] < noise["high"] and noise["groups"] == len(found["by_prompt"])
    page = (whole.folder / "report.html").read_text()
    assert "Another draw of this training buffer" in page and "bootstraps over evaluation prompts" in page


def test_every_analysis_has_a_switch_a_place_in_the_report_and_a_result(whole, analyses):
    assert set(NAMES) <= set(AnalysisConfig.model_fields) and list(PRESENTATIONS) == NAMES
    assert list(analyses) == NAMES and not whole.failed_analyses and not whole.failed_checks
    page = re.sub(r"base64,[A-Za-z0-9+/=]+|(?s:<script>.*?</script>)", "", (whole.folder / "report.html").read_text())
    for name, result in analyses.items():
        assert "skipped" not in result, (name, result["skipped"])
        assert PRESENTATIONS[name].question.replace("'", "&#39;") in page
        assert f'id="section-{name}"' in page
        for figure in PRESENTATIONS[name].figures:
            assert (whole.folder / "figures" / f"{figure}.png").stat().st_size > 5000
    assert not re.search(r"\bnan\b|\bNone\b", page), "a gap must be named"


def test_one_number_has_one_interval(whole, analyses):
    """The step's predicted and measured change have the same 95% interval in every part of the results."""
    summary = json_of(whole.summary)

    def ends(entry, name=""):
        return [entry[f"{name}{end}"] for end in ("low", "high")]

    predicted, measured = ends(summary["predicted"]["rao_blackwell"]["total"]), ends(summary["actual"]["snis"])
    assert all(math.isfinite(end) for end in (*predicted, *measured))
    (scaled,) = [row for row in summary["scaling"] if row["scale"] == 1.0]
    (compared,) = [row for row in analyses["entropy_prediction"]["rows"] if row["scale"] == 1.0]
    (baseline,) = [row for row in analyses["baselines"]["rows"] if row["name"] == "rao_blackwell"]
    for found in (
        ends(scaled, "predicted_"), ends(compared["predicted"]["rao_blackwell"]), ends(baseline)
    ):  # fmt: skip
        assert found == pytest.approx(predicted, rel=1e-6)
    for found in (
        ends(scaled, "actual_snis_"), ends(compared["measured"]["snis"]), ends(baseline, "actual_"),
        ends(analyses["baselines"]["measured"]),
    ):  # fmt: skip
        assert found == pytest.approx(measured, rel=1e-6)
    assert ends(analyses["higher_order"]["first_order"]) == pytest.approx(
        ends(summary["predicted"]["split"]["total"]), rel=1e-6
    )


def test_the_numbers_of_different_analyses_are_those_of_one_step(whole, analyses):
    summary = json_of(whole.summary)
    batch = summary["attribution"]["delta_h_batch"]
    assert analyses["attribution"]["total"] == pytest.approx(batch, rel=1e-4)
    assert analyses["attribution"]["evaluation"]["total"] == pytest.approx(
        summary["predicted"]["rao_blackwell"]["total"]["value"], rel=1e-4
    )
    run = next(row for row in analyses["weighting_schemes"]["rows"] if row["name"] == "run")
    assert run["delta_h"]["raw"]["value"] == pytest.approx(batch, rel=1e-3)
    of_step = summary["predicted"]["rao_blackwell"]["batch"]
    for end in ("low", "high"):
        wanted = pytest.approx(of_step[end], rel=1e-3, abs=1e-3 * of_step["standard_error"])
        assert run["delta_h"]["raw"][end] == wanted, "one number, one interval: is the entropy of the buffer held?"
        assert run["delta_h"]["equal_length"][end] == wanted
    assert run["actual"]["equal_length"]["value"] == pytest.approx(
        summary["predicted"]["split"]["batch"]["value"], rel=0.1
    ), "momentum and decay belong to no weighting: is the step of zero weights taken off?"
    least, n = run["actual"]["equal_length"]["effective_sample_size"], summary["actual"]["snis"]["n"]
    assert 1 <= least < n and run["actual"]["equal_length"]["trustworthy"] is (least >= n / 2)
    step = next(row for row in analyses["entropy_prediction"]["rows"] if row["scale"] == 1.0)
    assert step["measured"]["snis"]["value"] == pytest.approx(summary["actual"]["snis"]["value"], rel=1e-9)
    assert analyses["intervention"]["full_step"]["measured"] == pytest.approx(
        summary["actual"]["snis"]["value"], rel=1e-2, abs=1e-6
    ), "the step of all weights is the analysed step"
    whole_part = summary["actual"]["snis"]["effective_sample_size"] / summary["actual"]["snis"]["n"]
    assert 0 < analyses["intervention"]["effective_part"] <= 1.01 * whole_part, "the smallest of all these steps"
    predicted = analyses["intervention"]["full_step"]["predicted"]["split"]
    assert predicted == pytest.approx(summary["predicted"]["split"]["total"]["value"], rel=1e-3)


def test_own_changes_are_those_of_the_fixed_prefix_prediction(whole, analyses):
    """sum_t of <sum_k grad H_k, step> over all tokens is the fixed-prefix prediction of h."""
    own = np.array(analyses["attribution"]["evaluation"]["own_change"])
    tokens = sum(map(len, whole.evaluation.completion_ids))
    expected = json_of(whole.summary)["predicted"]["fixed_prefix"]["total"]["value"]
    assert own.sum() / tokens == pytest.approx(expected, rel=1e-3)


def test_train_kernels_follow_from_the_rows_that_the_folder_holds(whole):
    """The square kernel is that of the core on the training sequences alone."""
    from entropy_core import compute_kernels
    from entropy_core.adamw import adam_preconditioner
    from entropy_core.gradients import trainable_parameters
    from entropy_experiments.buffers.sampling_plan import plan_sampling
    from entropy_experiments.checkpoint_loader import load_checkpoint

    checkpoint = load_checkpoint(json_of(whole.summary)["checkpoint"]["path"])
    batch = whole.training.rollouts.to_batch(plan_sampling(checkpoint, whole_config()).sampling_config)
    p = adam_preconditioner(checkpoint.optimizer, trainable_parameters(checkpoint.model))
    expected = compute_kernels(checkpoint.model, batch, batch, p)
    stored = load_file(whole.folder / "kernel.safetensors")
    for name in ("fisher", "entropy_fisher"):
        found, wanted = stored[f"train_{name}"], getattr(expected, name)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4, name


def test_the_step_without_p_is_the_plain_gradient_step(whole, tiny_run, tmp_path):
    """As an analysis with P = 1 and the same rate predicts it."""
    plain = ["entropy_analysis.fisher_kernel.preconditioning=none", "checkpoint.learning_rate=1e-3"]
    other = run_fisher_analysis(tiny_run, config(*plain), folder=tmp_path / "plain")
    expected = other.numbers.step.predictions.per_token["rao_blackwell"]["total"]
    found = whole.numbers.step.predictions.without_preconditioner
    assert found.value == pytest.approx(expected.value, rel=1e-3)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-3)


def test_split_shares_add_up_to_the_split_estimators_batch_part(whole):
    found, expected = whole.numbers.step.attribution, whole.numbers.step.predictions.per_token["split"]["batch"].value
    assert float(found.measurement_shares.sum()) == pytest.approx(expected, rel=1e-3)
    products = found.products.numpy() * whole.training.weights.numpy() * found.step_factor
    np.testing.assert_allclose(found.shares.numpy(), products, rtol=1e-9)


def stub_inputs(*overrides):
    """What run_analyses itself looks at."""
    return SimpleNamespace(
        config=whole_config(*overrides),
        numbers=SimpleNamespace(kernels=object(), step=object(), estimand=SimpleNamespace(rows_drawn=True)),
    )


EMPTY = AttributionResult(
    unit="nats per token",
    total=0.0,
    horizon_factor=1.0,
    horizon_total=0.0,
    sequences=SequenceShares(share=[], horizon=[], prompt_index=[]),
    prompts=[],
    sum_of_effects=None,
    concentration=Concentrations(**dict.fromkeys(("all", "lowering", "raising"), concentration(np.zeros(0)))),
    top_sequences=[],
    tokens=None,
    evaluation=None,
    groups=[],
)


def replace_runs(monkeypatch, runs):
    """Analyses named in `runs` run these; the others do not apply."""

    def skipped(name):
        def run(inputs):
            raise NotApplicable(name)

        return run

    changed = tuple(dataclasses.replace(a, run=runs.get(a.name, skipped(a.name))) for a in ANALYSES)
    monkeypatch.setattr(analyses_runner, "ANALYSES", changed)


@pytest.mark.parametrize("name", NAMES)
def test_each_analysis_can_be_switched_off(monkeypatch, name):
    replace_runs(monkeypatch, {})
    found = run_analyses(stub_inputs(f"entropy_analysis.analysis.{name}=false"))
    assert [asked for asked, _ in found.entries()] == [other for other in NAMES if other != name]


def raising(inputs):
    raise ZeroDivisionError("the kernel has\nno rows")


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (raising, "ZeroDivisionError: the kernel has no rows"),
        (
            lambda inputs: AttributionResult(**{**dict(EMPTY), "total": float("nan")}),
            "not whole: total should be a finite",
        ),
        (lambda inputs: AttributionResult(unit="nats per token"), "not whole: total is missing"),
    ],
)
def test_whatever_goes_wrong_in_one_is_kept_under_its_name_and_the_others_still_run(monkeypatch, run, words):
    replace_runs(monkeypatch, {"attribution": run})
    found = run_analyses(stub_inputs())
    assert [asked for asked, _ in found.entries()] == NAMES and list(found.failed()) == ["attribution"]
    assert words in found.failed()["attribution"] and found.buffers == Skipped(skipped="buffers")


@pytest.mark.long
def test_a_failing_analysis_is_named_and_fails_the_run(tiny_run, tmp_path, monkeypatch):
    changed = tuple(dataclasses.replace(a, run=raising) if a.name == "buffers" else a for a in ANALYSES)
    monkeypatch.setattr(analyses_runner, "ANALYSES", changed)
    with pytest.raises(UserError, match=r"an analysis failed: buffers \(ZeroDivisionError.*--keep-going") as caught:
        run_fisher_analysis(tiny_run, config(), folder=tmp_path / "no")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("no*"))
    kept = run_fisher_analysis(tiny_run, config(), folder=tmp_path / "kept", keep_going=True)
    assert list(kept.failed_analyses) == ["buffers"]
    assert "entropy_prediction" in json_of(kept.summary)["analyses"], "the others still run"
    stored = json.loads((kept.folder / "run.json").read_text())
    assert "no rows" in stored["failed_analyses"]["buffers"]
    page = (kept.folder / "report.html").read_text()
    assert "1 analysis FAILED" in page and re.search(r'<p class="finding bad"[^>]*>FAILED', page)
    assert not (kept.folder / "figures" / "buffers.png").exists()


@pytest.mark.long
def test_what_does_not_apply_says_why(tiny_run, tmp_path):
    path = tmp_path / "two.jsonl"
    lines = [{"prompt": f"{k} + 1 =", "completion": "a b", "weight": w} for k, w in enumerate((0.05, -0.03))]
    path.write_text("\n".join(map(json.dumps, lines)))
    two = f"entropy_analysis.sampling.train_sequences_path={path}"
    no_kernel = "entropy_analysis.fisher_kernel.compute_full=false"
    small = run_fisher_analysis(tiny_run, whole_config(two, no_kernel), folder=tmp_path / "small")
    assert not small.failed_analyses
    skipped = {
        name: result["skipped"] for name, result in json_of(small.summary)["analyses"].items() if "skipped" in result
    }
    assert set(skipped) == {"intervention", "prompt_structure", "sequence_clustering"}
    assert "compute_full=false" in skipped["prompt_structure"] and "halved in 2 ways only" in skipped["intervention"]
    assert "Not analysed: the kernel was not computed" in (small.folder / "report.html").read_text()


@pytest.mark.long
def test_given_rows_and_columns_without_weights_leave_what_makes_sense(tiny_run, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{k} + {k} =", "completion": f"{2 * k}"}) for k in range(6)))
    rows = run_fisher_analysis(
        tiny_run, whole_config(f"entropy_analysis.sampling.eval_sequences_path={path}"), folder=tmp_path / "rows"
    )
    results = json_of(rows.summary)["analyses"]
    assert not rows.failed_analyses
    assert {name for name in results if "skipped" in results[name]} == {
        "higher_order",
        "weighting_schemes",
        "prices",
        "baselines",
    }
    assert set(results["intervention"]["scores"]) == {"fixed_prefix", "response"}
    columns = run_fisher_analysis(
        tiny_run, whole_config(f"entropy_analysis.sampling.train_sequences_path={path}"), folder=tmp_path / "columns"
    )
    results = json_of(columns.summary)["analyses"]
    assert not columns.failed_analyses
    assert {name for name in results if "skipped" not in results[name]} == {"buffers", "sequence_clustering"}
    assert "no step" in results["attribution"]["skipped"]


def test_stages_of_the_analyses_are_announced_and_timed(whole):
    stages = [stage["name"] for stage in json.loads((whole.folder / "run.json").read_text())["stages"]]
    assert [s for s in stages if s.startswith("analysis: ")] == [f"analysis: {n.replace('_', ' ')}" for n in NAMES]
    rows = pq.read_table(whole.folder / "sequences.parquet").to_pylist()
    assert len(rows) == 32
