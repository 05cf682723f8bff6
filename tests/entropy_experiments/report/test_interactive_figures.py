"""The data of every interactive figure, held against the folder's own numbers by arithmetic of its own."""

import base64
import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.records.estimates import Estimate, StudentEstimate
from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.records.record import json_of, validated
from entropy_experiments.records.summary import StepParts
from entropy_experiments.records.weighting_results import EntropyChanges
from entropy_experiments.report.interactive import sequences as sequences_module
from entropy_experiments.report.interactive.history import training_history
from entropy_experiments.report.interactive.kernels import kernel_explorer
from entropy_experiments.report.interactive.page import json_for_script, numbers, plot_text
from entropy_experiments.report.interactive.predicted import entropy_split, predicted_vs_actual
from entropy_experiments.report.interactive.sequences import sequence_details
from entropy_experiments.report.interactive.shares import sequence_shares
from entropy_experiments.report.interactive.weightings import weighting_schemes
from entropy_experiments.text.display import PromptFrame, prompt_frame
from entropy_experiments.text.tokens import token_texts
from tests.entropy_experiments.results_fixture import make_history, make_sequences, make_summary
from tests.entropy_experiments.whole_summary import clustering as planted_clustering
from tests.entropy_experiments.whole_summary import history_of

ROWS, FISHER, ENTROPY_FISHER = make_sequences(np.random.default_rng(0))
TRAINING = [row for row in ROWS if row["buffer"] == "training"]
EVALUATION = [row for row in ROWS if row["buffer"] == "evaluation"]


T31 = float(stats.t.ppf(0.975, 31))


def named(plot, name):
    return next(trace for trace in plot["data"] if trace["name"].startswith(name))


def unpacked(text):
    raw = base64.b64decode(text)
    return [value for (value,) in struct.iter_unpack("<f", raw)]


def every_text(tree):
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in every_text(value)]
    if isinstance(tree, list):
        return [text for value in tree for text in every_text(value)]
    return [tree] if isinstance(tree, str) else []


def test_predicted_against_actual_shows_both_and_their_ratio():
    summary = make_summary(ROWS)
    plot = predicted_vs_actual(
        summary["scaling"], predicted_standard_error=0.018, actual_standard_error=0.022, degrees_of_freedom=31
    )
    json.dumps(plot, allow_nan=False)
    predicted, measured = named(plot, "predicted (first"), named(plot, "measured (rew")
    assert predicted["x"] == measured["x"] == [0.0625, 0.125, 0.25, 0.5, 1.0]
    for trace, key in ((predicted, "predicted"), (measured, "actual_snis")):
        assert trace["y"] == pytest.approx([row[key] for row in summary["scaling"]], rel=1e-5)
    assert measured["error_y"]["array"] == [None] * 4 + [pytest.approx(T31 * 0.022)], (
        "Student's interval, at s = 1 only"
    )
    band = named(plot, "95%")
    ends = [-0.074 + sign * T31 * 0.018 for sign in (-1, 1)]
    assert band["y"][4:6] == pytest.approx(ends, rel=1e-4)
    assert band["x"][4:6] == [1.0, 1.0]
    assert named(plot, "measured / predicted")["y"][-1] == pytest.approx(-0.08 / -0.074, rel=1e-3)
    assert named(plot, "same sample")["y"][0] == pytest.approx(1 + 0.0015 * 0.0625 / 0.0785, rel=1e-4)
    assert predicted_vs_actual([]) is None and predicted_vs_actual([{"scale": 1.0}]) is None
    ratios = predicted_vs_actual([{"scale": 1.0, "predicted": 0.0, "actual_snis": 1.0}])
    assert not [trace for trace in ratios["data"] if trace.get("yaxis") == "y2"], "nothing is divided by 0"


def test_entropy_split_has_three_parts_that_add_up():
    parts = validated(StepParts, make_summary(ROWS)["predicted"]["rao_blackwell"], "summary.json")
    measured = Estimate(value=-0.08, standard_error=0.022, low=-0.08 - T31 * 0.022, high=-0.08 + T31 * 0.022)
    trace = entropy_split(parts, measured)["data"][0]
    assert sum(trace["y"][:3]) == pytest.approx(trace["y"][3], abs=1e-6) and trace["y"][4] == -0.08
    assert trace["error_y"]["array"][3:] == pytest.approx([T31 * 0.018, T31 * 0.022])
    assert trace["customdata"][4] == "−0.080 [−0.125, −0.035]"
    assert entropy_split(None, None) is None
    gap = entropy_split(parts, None)["data"][0]
    assert gap["y"][:4] == trace["y"][:4] and gap["y"][4] is None and gap["error_y"]["array"][4] is None


def test_shares_are_sorted_and_lead_to_their_sequences():
    plot = sequence_shares(TRAINING)
    places = []
    for trace in plot["data"]:
        places += zip(trace["x"], trace["y"], trace["customdata"], strict=True)
    places.sort(key=lambda place: place[0])
    assert [x for x, _, _ in places] == list(range(1, 65))
    values = [y for _, y, _ in places]
    assert values == sorted(values)
    for _, value, data in places:
        row = TRAINING[data[0]]
        assert value == pytest.approx(1e3 * row["delta_h"], rel=1e-5) and data[1] == row["prompt_index"]
    for trace, sign in zip(plot["data"], (1, -1), strict=True):
        assert {np.sign(TRAINING[data[0]]["advantage"]) for data in trace["customdata"]} == {sign}
    without = [row | {"delta_h": None} for row in TRAINING]
    assert sequence_shares(without) is None and sequence_shares([]) is None
    one_gone = sequence_shares([TRAINING[0] | {"delta_h": None}, *TRAINING[1:]])
    assert sum(len(trace["x"]) for trace in one_gone["data"]) == 63


def test_weightings_show_what_is_known(whole_report):
    record = finished(read_results_folder(whole_report).summary.analyses.weighting_schemes)
    plot, table = weighting_schemes(record), json_of(record)
    axes = {"x": "equal_length", "x2": "equal_gain"}
    for trace in plot["data"]:
        key, part = axes[trace["xaxis"]], {"predicted": "delta_h", "measured": "actual"}[trace["name"]]
        labels = {plot_text(row["label"], 60): row for row in table["rows"]}
        labelled = plot["layout"]["yaxis"]["ticktext"]
        assert [round(y - 0.1) for y in trace["y"]] == list(range(len(labelled)))
        for (label, _), value, bar in zip(trace["customdata"], trace["x"], trace["error_x"]["array"], strict=True):
            entry = labels[label].get(part, {}).get(key, {"value": None})
            assert value is None if entry["value"] is None else value == pytest.approx(entry["value"], rel=1e-5)
            if entry["value"] is not None and entry["standard_error"] is not None:
                freedom = entry.get("degrees_of_freedom") or math.inf
                reach = float(stats.t.ppf(0.975, freedom)) * entry["standard_error"]
                high = entry.get("high")
                assert bar == pytest.approx(reach if high is None else high - entry["value"], rel=1e-5, abs=1e-12)
    run = next(row for row in table["rows"] if row["kind"] == "run")["delta_h"]
    marks = {shape["xref"]: shape["x0"] for shape in plot["layout"]["shapes"]}
    assert marks == {axis: run[key]["value"] for axis, key in axes.items() if run[key]["value"] is not None}
    assert [data[0] for data in plot["data"][0]["customdata"]] == labelled
    assert len(plot["data"]) >= 2 and weighting_schemes(record.model_copy(update={"rows": ()})) is None
    number, nothing = (StudentEstimate(value=v, standard_error=None, degrees_of_freedom=None) for v in (1.0, None))
    changes = EntropyChanges(raw=number, equal_length=number, equal_gain=nothing)
    length_only = record.model_copy(update={"rows": (record.rows[0].model_copy(update={"delta_h": changes}),)})
    assert list(weighting_schemes(length_only)["layout"]["xaxis"]["domain"]) == [0, 1]


def test_history_has_a_panel_for_each_quantity():
    history = make_history()
    plot = training_history(history_of(history), 8)
    assert named(plot, "entropy, sequences trained on")["y"] == pytest.approx(
        [row["entropy"] for row in history], rel=1e-5
    )
    assert named(plot, "predicted")["error_y"]["array"] == [pytest.approx(float(stats.t.ppf(0.975, 3)) * 0.02)] * 13
    assert "error_y" not in named(plot, "measured"), "no standard error was stored"
    assert [trace["yaxis"] for trace in plot["data"]] == ["y", "y", "y2", "y3", "y3", "y3"]
    assert plot["layout"]["shapes"][0]["x0"] == 8
    short = training_history(history_of([{"step": 1, "reward": 0.5}]))
    assert [trace["name"] for trace in short["data"]] == ["reward"] and short["layout"]["yaxis"]["domain"] == [0.0, 1]
    assert training_history(history_of([{"step": 1}])) is None and training_history([]) is None


def test_kernels_and_their_orders():
    labels = [None] + [1] * 30 + [2] * 33
    leaves = {"sequences": list(range(1, 64)), "leaf_order": list(range(63, 0, -1))}
    clustering = validated(ClusteringResult, planted_clustering(labels) | leaves, "summary.json")
    found = kernel_explorer({"fisher": FISHER, "entropy_fisher": ENTROPY_FISHER}, EVALUATION, TRAINING, clustering)
    json.dumps(found, allow_nan=False)
    assert (found["rows"], found["columns"]) == FISHER.shape
    for kernel, matrix in zip(found["kernels"], (FISHER, ENTROPY_FISHER), strict=True):
        np.testing.assert_array_equal(np.array(unpacked(kernel["values"]), np.float32).reshape(matrix.shape), matrix)
        beyond = np.mean(np.abs(matrix) > kernel["limit"])
        assert 0.008 < beyond < 0.012, "the colour scale ends at percentile 99"
    prompt, cluster, share = found["column_orders"]
    assert prompt["groups"] == [TRAINING[i]["prompt_index"] for i in prompt["order"]] == sorted(prompt["groups"])
    assert cluster["order"] == [*range(63, 0, -1), 0] and cluster["groups"] == ["2"] * 33 + ["1"] * 30 + ["none"]
    shares = [TRAINING[i]["delta_h"] for i in share["order"]]
    assert shares == sorted(shares) and share["groups"] is None
    assert sorted(share["order"]) == list(range(64))


def test_no_clusters_make_no_order():
    found = kernel_explorer({"fisher": FISHER}, EVALUATION, TRAINING, None)
    assert [order["label"] for order in found["column_orders"]] == [
        "by prompt",
        "by accounting share of Δh, lowest first",
    ]


def test_kernels_that_cannot_be_explored():
    assert kernel_explorer({}, EVALUATION, TRAINING) is None
    assert kernel_explorer({"fisher": np.full_like(FISHER, np.nan)}, EVALUATION, TRAINING) is None
    assert kernel_explorer({"fisher": np.zeros((1001, 1000), np.float32)}, [], []) is None
    holes = FISHER.copy()
    holes[3, 4] = np.inf
    assert np.isinf(
        unpacked(kernel_explorer({"fisher": holes}, EVALUATION, TRAINING)["kernels"][0]["values"])[3 * 64 + 4]
    )


def test_sequences_carry_texts_numbers_and_tokens():
    frame = prompt_frame([row["prompt"] for row in ROWS])
    found = sequence_details(EVALUATION, TRAINING, frame)
    json.dumps(found, allow_nan=False)
    assert found["left_out"] == 0 and len(found["prompts"]) == len({row["prompt"] for row in ROWS})
    for shown, row in zip(found["evaluation"] + found["training"], EVALUATION + TRAINING, strict=True):
        assert found["prompts"][shown["prompt"]]["whole"] == row["prompt"]
        assert "".join(shown["tokens"]["texts"]) == row["completion"] == shown["completion"]
        assert unpacked(shown["tokens"]["logprobs"]) == pytest.approx(row["logprobs"], rel=1e-6)
    for shown, row in zip(found["training"], TRAINING, strict=True):
        assert sum(unpacked(shown["tokens"]["shares"])) == pytest.approx(row["delta_h"], rel=1e-4)
        facts = dict(shown["facts"])
        assert float(facts["accounting share of Δh"].split(" ")[0].replace("−", "-")) == pytest.approx(
            row["delta_h"], rel=5e-3
        )
        shown = facts["effect of leaving out"].split(" ")[0].replace("−", "-")
        assert float(shown) == pytest.approx(row["effect_of_leaving_out"], rel=5e-3)
    assert all(shown["tokens"]["shares"] is None for shown in found["evaluation"])


def test_a_page_stays_small(monkeypatch):
    monkeypatch.setattr(sequences_module, "MOST_TOKENS", 100)
    found = sequence_details(EVALUATION, TRAINING, PromptFrame("", ""))
    kept = [row for shown, row in zip(found["training"], TRAINING, strict=True) if shown["tokens"]]
    assert kept and sum(row["length"] for row in kept) <= 100
    assert found["left_out"] == len(ROWS) - len(kept) - sum(
        shown["tokens"] is not None for shown in found["evaluation"]
    )
    largest = max(TRAINING, key=lambda row: abs(row["delta_h"]))
    assert largest in kept


def test_numbers_and_texts_for_a_page():
    assert numbers([1.0, np.nan, -np.inf, 1 / 3]) == [1.0, None, None, 0.333333]
    hostile = "</script><!-- &amp; \u2028 \x00 <b>\ud800"
    text = str(json_for_script({"text": hostile}))
    assert json.loads(text)["text"] == hostile and text.isascii() and not {"<", ">", "&"} & set(text)
    with pytest.raises(ValueError, match="JSON"):
        json_for_script([float("nan")])
    assert plot_text("<a href='x'>\n\x00&") == "&lt;a href='x'&gt; ↵ ⟨U+0000⟩&amp;"
    rows = [row | {"completion": "<b>bold</b>" * 50} for row in TRAINING]
    assert not any(
        "<b>" in text for text in every_text([trace["customdata"] for trace in sequence_shares(rows)["data"]])
    )


def test_token_texts_put_characters_together():
    """A byte-level tokenizer whose decode loses nothing but unfinished characters."""
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    for text in ("plain", "añb", "👩‍🔬 ok 日本", "", "e\u0301"):
        ids = list(text.encode())
        pieces = token_texts(tokenizer, ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)
    assert token_texts(tokenizer, list("é".encode()[:1])) == ["�"], "an end in the middle of a character is shown"
    assert "".join(token_texts(tokenizer, [0x80] * 20 + [65])).endswith("A")
    words = {1: "▁Hi", 2: "▁there", 3: "!"}
    stripping = SimpleNamespace(decode=lambda ids: "".join(words[i] for i in ids).replace("▁", " ").lstrip(" "))
    assert token_texts(stripping, [1, 2, 3]) == ["Hi", " there", "!"], "the space before a word survives"
