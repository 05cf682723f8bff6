"""Comparisons: differences and their standard errors against brute force, the words, the refusals, the folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.compare.differences import compare_sides
from entropy_experiments.compare.page import write_comparison
from entropy_experiments.compare.sides import caveats, open_sides
from entropy_experiments.compare.verdict import comparison_verdict
from entropy_experiments.records.comparison_record import ComparisonRecord
from entropy_experiments.records.record import json_of, validated
from rl_training.errors import UserError
from tests.entropy_experiments.comparison_fixture import (
    build_side,
    build_sweep,
    edit_summary,
    leave_out_means,
    prompt_effects,
)
from tests.entropy_experiments.small_analysis import config
from tests.entropy_experiments.whole_summary import policy


def point_of(*folders):
    return compare_sides(open_sides(folders))[-1]


def sentences(*folders):
    sides = open_sides(folders)
    points = compare_sides(sides)
    return [s.text for s in comparison_verdict(sides, points, caveats(sides, points[-1].analyses) if points else [])]


def jackknife(differences: np.ndarray) -> float:
    """The standard error of a mean of per-prompt differences: s / sqrt(B), which the jackknife of a mean is equal to."""
    return float(np.std(differences, ddof=1) / np.sqrt(len(differences)))


@pytest.fixture
def pair(tmp_path):
    """Two analyses on the same prompts, listed in another order by the second."""
    order = np.random.default_rng(5).permutation(32)
    return build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, shift=0.05, order=order)


def test_paired_differences_are_those_of_the_prompts_themselves(pair):
    point = point_of(*pair)
    a, b = prompt_effects(1), prompt_effects(2, 0.05)
    for row in point.rows:
        if row.quantity.key not in a:
            continue
        gap, by_prompt = row.differences[1], b[row.quantity.key] - a[row.quantity.key]
        assert gap.value == pytest.approx(by_prompt.mean(), abs=1e-12), f"{row.quantity.key}: sign or side swapped"
        assert gap.number.standard_error == pytest.approx(jackknife(by_prompt), rel=1e-9, abs=1e-12), (
            f"{row.quantity.key}: rows matched by place rather than by prompt, or errors added as if unpaired"
        )
        assert gap.prompts == 32
    measured = point.row("measured").differences[1]
    assert measured.number.standard_error < 0.5 * np.hypot(
        *(number.standard_error for number in point.row("measured").numbers)
    ), "pairing buys nothing"


def test_other_prompts_are_compared_unpaired_and_say_so(tmp_path):
    folders = build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, shift=0.05, prompts="other")
    row = point_of(*folders).row("measured")
    assert row.differences[1].prompts == 0
    assert row.differences[1].number.standard_error == pytest.approx(
        np.hypot(*(number.standard_error for number in row.numbers)), rel=1e-12
    )
    text = " ".join(sentences(*folders))
    assert "unpaired, other evaluation prompts (0 of 32 shared)" in text and "as if independent" in text


def test_numbers_of_the_sequences_are_paired_too(pair):
    """Reward and entropy per completion are not stored by prompt: they come from the sequences."""
    rows = {row.quantity.key: row for row in point_of(*pair).rows}
    sequences = pq.read_table(pair[0] / "sequences.parquet").to_pylist()
    rewards = [row["reward"] for row in sequences if row["buffer"] == "evaluation"]
    number = rows["reward"].numbers[0]
    assert number.value == pytest.approx(np.mean(rewards))
    assert number.standard_error == pytest.approx(jackknife(np.array(rewards)))
    assert rows["reward"].differences[1].prompts == 32 and rows["reward"].differences[1].value == 0


def test_folders_of_format_1_are_compared_unpaired(pair):
    (pair[1] / "leave_one_out.parquet").unlink()
    point = point_of(*pair)
    assert point.row("measured").differences[1].prompts == 0
    assert "not stored prompt by prompt" in " ".join(sentences(*pair))
    assert point.row("entropy").differences[1].prompts == 32  # from the sequences


def test_the_paired_error_is_that_of_repeated_draws_of_prompts(tmp_path):
    """Over many draws of prompts the spread of b − a is what the jackknife says, far below the unpaired error."""
    generator, found, errors = np.random.default_rng(11), [], []
    for _ in range(400):
        common = generator.normal(0, 0.1, 24)
        a, b = (-0.1 + common + generator.normal(0, 0.02, 24) for _ in range(2))
        series = torch.tensor(leave_out_means(b)) - torch.tensor(leave_out_means(a))
        found.append(b.mean() - a.mean())
        errors.append(jackknife_standard_error(series))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


@pytest.fixture(scope="module")
def real_pair(tiny_run, tmp_path_factory):
    """Two checkpoints of one run, analysed with the same evaluation prompts."""
    from entropy_experiments.entropy_runner import run_fisher_analysis

    root = tmp_path_factory.mktemp("real")
    settings = config("entropy_analysis.sampling.eval_prompts=fixed_set")
    return [
        run_fisher_analysis(tiny_run / f"checkpoint-{step}", settings, folder=root / f"step-{step}") for step in (2, 4)
    ]


@pytest.mark.long
def test_the_stored_values_are_those_of_analyses_without_the_prompt(real_pair):
    """Contributions, entropies and SNIS ratios summed anew without each prompt, from what the analysis kept by sequence."""
    analysis = real_pair[1]
    stored = pq.read_table(analysis.folder / "leave_one_out.parquet").to_pydict()
    sequences = pq.read_table(analysis.folder / "sequences.parquet").to_pylist()
    rows = [row for row in sequences if row["buffer"] == "evaluation"]
    prompts = sorted({row["prompt_index"] for row in rows})
    assert stored["prompt_index"] == prompts
    assert stored["prompt"] == [next(r["prompt"] for r in rows if r["prompt_index"] == p) for p in prompts]
    for place, prompt in enumerate(prompts):
        kept = [row for row in rows if row["prompt_index"] != prompt]
        entropy = sum(row["entropy_sum"] for row in kept) / sum(row["length"] for row in kept)
        assert stored["entropy.per_token"][place] == pytest.approx(entropy, rel=1e-6)
        # Of predictions, tests/entropy_experiments/statistics/test_agreement.py takes whole gradients without each prompt.
        parts = [stored[f"predicted.rao_blackwell.{part}"][place] for part in ("batch", "momentum", "weight_decay")]
        assert sum(parts) == pytest.approx(stored["predicted.rao_blackwell.total"][place], rel=1e-4, abs=1e-8)
    summary = json.loads((analysis.folder / "summary.json").read_text())
    for name in ("entropy.per_token", "predicted.split.momentum", "actual.snis", "actual.fixed_prefix"):
        node = summary
        for key in name.split("."):
            node = node[key]
        values = np.array(stored[name])
        error = np.sqrt((len(values) - 1) / len(values) * np.sum((values - values.mean()) ** 2))
        assert error == pytest.approx(node["standard_error"], rel=1e-6), (
            f"{name}: another number's leave-one-out values"
        )
        assert values.mean() == pytest.approx(node["value"], rel=0.2, abs=0.05 * abs(node["value"]) + 1e-4)


def test_two_real_analyses(real_pair, tmp_path):
    found = write_comparison([analysis.folder for analysis in real_pair], tmp_path / "out")
    assert {row.quantity for row in found.quantities} >= {
        "entropy",
        "measured_change",
        "predicted_change",
        "reward",
    }
    assert all(gap["B"].paired_prompts for gap in (row.minus_a for row in found.quantities) if gap)
    assert any("Checkpoints of different training steps: A 2, B 4." == sentence.text for sentence in found.verdict)


@pytest.mark.parametrize(
    ("a", "b", "noise", "words"),
    [
        (-0.10, -0.05, 0.001, "B loses 0.05"),
        (-0.05, -0.10, 0.001, "more than A"),
        (0.05, 0.10, 0.001, "B gains"),
        (0.10, 0.05, 0.001, "less than A"),
        (-0.05, 0.05, 0.001, "B gains entropy and A loses it"),
        (0.05, -0.05, 0.001, "B loses entropy and A gains it"),
        (-0.10, -0.09, 0.2, "is not significantly different from 0"),
        (-0.10, -0.05, 0.0667, "B loses"),  # three standard errors
        (-0.10, -0.05, 0.143, "is not significantly different from 0"),  # one and a half
    ],
)
def test_the_first_sentence_in_plain_words(tmp_path, a, b, noise, words):
    folders = []
    for name, value in (("a", a), ("b", b)):
        effects = prompt_effects(1 if name == "a" else 2)
        own = np.random.default_rng(ord(name)).normal(0, noise, 32)
        effects["actual.snis"] = value + own - own.mean()
        folders.append(build_side(tmp_path / name, effects=effects))
    first = sentences(*folders)[0]
    assert words in first and "paired over 32 shared evaluation prompts" in first


def test_a_failed_self_check_comes_first(pair):
    run = json.loads((pair[1] / "run.json").read_text())
    run["self_checks"][0] |= {"passed": False, "name": "<b>rows</b>"}
    (pair[1] / "run.json").write_text(json.dumps(run))
    assert sentences(*pair)[0].startswith("B: 1 of 7 self-checks FAILED (<b>rows</b>)")


def test_three_sides_are_each_compared_with_the_first(pair, tmp_path):
    third = build_side(tmp_path / "c", 3, shift=-0.05)
    row = point_of(*pair, third).row("measured")
    assert row.differences[0] is None
    a, b, c = (prompt_effects(seed, shift)["actual.snis"] for seed, shift in ((1, 0.0), (2, 0.05), (3, -0.05)))
    assert row.differences[1].value == pytest.approx((b - a).mean())
    assert row.differences[2].value == pytest.approx((c - a).mean())
    assert row.differences[2].number.standard_error == pytest.approx(jackknife(c - a), rel=1e-9)


def test_caveats_name_what_does_not_match(pair):
    def change(summary):
        summary["policy"] = policy(temperature=0.7)
        summary["checkpoint"] |= {"step": 16, "model": "other"}
        summary["attribution"] |= {"preconditioner": "none", "kernel_preconditioner": "none"}

    edit_summary(pair[1], change)
    text = " ".join(sentences(*pair))
    for words in ("temperature: A 1, B 0.7", "training steps: A 8, B 16", "Different models", "plain gradient step"):
        assert words in text


def refused(*folders, match):
    with pytest.raises(UserError, match=match) as error:
        open_sides(folders)
    assert "\n" not in str(error.value)


def test_bad_folders_are_refused_in_one_line(pair, tmp_path):
    a, b = pair
    refused(a, match="needs two folders")
    refused(a, a, match="given twice")
    (tmp_path / "link").symlink_to(a)
    refused(a, tmp_path / "link", match="given twice")
    refused(a, tmp_path / "nothing", match="no results folder")
    (tmp_path / "empty").mkdir()
    refused(a, tmp_path / "empty", match="not the results folder")
    (tmp_path / "training" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "training" / "checkpoint-4" / "trainer_state.json").write_text("{}")
    refused(a, tmp_path / "training", match="analyse it first")
    shutil.copytree(a, tmp_path / "x.part")
    refused(a, tmp_path / "x.part", match="unfinished")
    refused(*(shutil.copytree(a, tmp_path / f"copy{k}") for k in range(9)), match="at most 8")
    (b / "leave_one_out.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        compare_sides(open_sides([a, b]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update(format_version=99), "format 99"),
        (lambda s: s["policy"].update(tokenizer="fedcba9876543210"), "different tokenizers"),
        (lambda s: s.pop("policy"), "policy is missing: run .entropy-experiments analyze. again"),
        (lambda s: s.update(rows_drawn=False), "given texts"),
    ],
)
def test_numbers_of_another_quantity_are_refused(pair, change, match):
    edit_summary(pair[1], change)
    refused(*pair, match=match)


def test_a_missing_kernel_is_refused_and_one_not_computed_is_not(pair):
    (pair[1] / "kernel.safetensors").unlink()
    refused(*pair, match=r"kernel\.safetensors is missing")
    edit_summary(pair[1], lambda summary: summary.update(kernel=None))
    assert point_of(*pair).row("measured").differences[1] is not None


def test_analyses_without_a_step_compare_their_entropies(pair):
    def change(summary):
        summary |= {"step_analysed": False, "predicted": {}, "actual": {}}

    for folder in pair:
        edit_summary(folder, change)
    text = sentences(*pair)[0]
    assert "cannot be compared: not both" in text
    assert sentences(*pair)[1].startswith("Before the step")


@pytest.fixture
def sweeps(tmp_path):
    return (
        build_sweep(tmp_path / "plain", {4: 0.0, 8: 0.0, 12: 0.0}, seed=100),
        build_sweep(tmp_path / "bonus", {8: 0.05, 12: 0.06, 16: 0.07}, seed=200, failed=(20,)),
    )


def test_sweeps_are_compared_at_the_steps_they_share(sweeps, tmp_path):
    sides = open_sides(sweeps)
    points = compare_sides(sides)
    assert [point.step for point in points] == [8, 12]
    a, b = prompt_effects(112)["actual.snis"], prompt_effects(212, 0.06)["actual.snis"]
    assert points[1].row("measured").differences[1].number.standard_error == pytest.approx(jackknife(b - a), rel=1e-9)
    text = " ".join(sentences(*sweeps))
    assert "At step 12, the last that all have: B loses" in text and "Of 2 shared checkpoints" in text
    assert "run_checkpoint-20" in text
    found = write_comparison(sweeps, tmp_path / "out")
    assert found.kind == "sweep" and found.shared_steps == (8, 12)
    assert (tmp_path / "out" / "figures" / "checkpoints.png").is_file()
    tidy = pq.read_table(tmp_path / "out" / "comparison.parquet").to_pandas()
    chosen = tidy[(tidy.step == 12) & (tidy.quantity == "measured_change") & tidy.minus.notna()]
    assert chosen.value.to_list() == [pytest.approx((b - a).mean())] and chosen.paired_prompts.to_list() == [32]


def test_sweeps_that_share_no_step_show_their_courses(tmp_path):
    sweeps = build_sweep(tmp_path / "a", {4: 0.0}), build_sweep(tmp_path / "b", {8: 0.0})
    found = write_comparison(sweeps, tmp_path / "out")
    assert "share no training step" in found.verdict[0].text and found.quantities == ()


def test_a_sweep_of_two_runs_is_two_sides(tmp_path):
    folder = build_sweep(tmp_path / "both", {8: 0.0}, run="plain")
    build_sweep(tmp_path / "other", {8: 0.05}, run="bonus", seed=50)
    records = [json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("both", "other")]
    shutil.copytree(tmp_path / "other" / "checkpoints", folder / "checkpoints", dirs_exist_ok=True)
    both = records[0] | {"checkpoints": records[0]["checkpoints"] + records[1]["checkpoints"]}
    (folder / "sweep.json").write_text(json.dumps(both))
    assert [side.name for side in open_sides([folder])] == ["both: plain", "both: bonus"]


def test_bad_sweeps_are_refused_in_one_line(pair, sweeps, tmp_path):
    refused(pair[0], sweeps[0], match="is a sweep and .* a single analysis")
    record = sweeps[1] / "sweep.json"
    content = json.loads(record.read_text())
    for entry in content["checkpoints"]:
        entry["folder"] = "../../elsewhere"
    record.write_text(json.dumps(content))
    refused(*sweeps, match="not inside the sweep")
    record.write_text("[]")
    refused(*sweeps, match=r"sweep.json: the file should be an object")
    record.unlink()
    (sweeps[1] / "sweep_plan.json").write_text("{}")
    refused(*sweeps, match="unfinished sweep")
    nothing = build_sweep(tmp_path / "nothing", {}, failed=(4,)) if (tmp_path / "nothing").mkdir() is None else None
    refused(sweeps[0], nothing, match="no finished analysis")


def test_the_folder_appears_whole_and_is_replaced_only_when_asked(pair, tmp_path):
    out = tmp_path / "deep" / "out"
    found = write_comparison(pair, out)
    assert {path.name for path in out.iterdir()} == {
        "comparison.html",
        "comparison.json",
        "comparison.parquet",
        "figures",
    }
    assert not list(out.parent.glob("*.part"))
    written = json.loads((out / "comparison.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert validated(ComparisonRecord, written, "comparison.json") == found
    with pytest.raises(UserError, match="exists already"):
        write_comparison(pair, out)
    write_comparison(pair, out, overwrite=True)
    with pytest.raises(UserError, match="not a folder that compare wrote"):
        write_comparison(pair, pair[0], overwrite=True)
    assert (pair[0] / "summary.json").is_file(), "compare destroyed what it was to compare"


def test_the_same_folders_give_the_same_bytes(pair, tmp_path):
    for name in ("one", "two"):
        write_comparison(pair, tmp_path / name)
    for file in ("comparison.html", "comparison.json", "figures/changes.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_hostile_names_and_texts_are_shown_as_text(tmp_path):
    name = "<script>alert(1)</script>$x^"
    a = build_side(tmp_path / "plain", 1)
    b = build_side(Path(tmp_path / name.replace("/", "-")), 2, shift=0.05)

    def change(summary):
        summary["checkpoint"]["model"] = "<img src=x onerror=alert(1)>\x00\u202e"
        summary["policy"]["task"] = "</script><script>alert(2)</script>"

    edit_summary(b, change)
    write_comparison([a, b], tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page and "\x00" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_single_prompt_has_no_paired_error(tmp_path):
    effects = {key: values[:1] for key, values in prompt_effects(1).items()}
    folders = []
    for name in "ab":
        folder = build_side(tmp_path / name, 1)
        table = pq.read_table(folder / "leave_one_out.parquet").slice(0, 1)
        empty = {key: [None] for key in effects}
        columns = {c: table[c].to_pylist() for c in ("prompt_index", "prompt")} | empty
        pq.write_table(pa.table(columns), folder / "leave_one_out.parquet")
        edit_summary(folder, lambda s: s["actual"]["snis"].update(standard_error=None))
        folders.append(folder)
    gap = point_of(*folders).row("measured").differences[1]
    assert gap.number.standard_error is None and gap.differs_from_zero is None
    found = write_comparison(folders, tmp_path / "out")
    assert "NaN" not in json.dumps(json_of(found))
