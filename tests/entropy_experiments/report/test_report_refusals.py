"""Folders that are no whole results of this version: one clear line, and no page."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from entropy_experiments.records.reader import RESULTS_FORMAT, read_results_folder
from entropy_experiments.report.page import write_report
from rl_training.errors import UserError
from tests.entropy_experiments.results_fixture import (
    build_results,
    make_sequences,
    make_summary,
    write_json,
    write_sequences,
)


def training_rows():
    rows, _, _ = make_sequences(np.random.default_rng(0))
    return rows, [row for row in rows if row["buffer"] == "training"]


def edit_json(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        write_json(folder, name, change(content) or content)

    return apply


def test_older_and_newer_formats(tmp_path):
    folder = build_results(tmp_path)
    rows, _ = training_rows()
    for version, words in (
        (RESULTS_FORMAT + 1, "reads 2: upgrade"),
        (1, "older version .* run `entropy-experiments analyze` again"),
        ("2", "not a whole number"),
        (True, "whole"),
    ):
        write_json(folder, "summary.json", make_summary(rows) | {"format_version": version})
        with pytest.raises(UserError, match=words):
            write_report(folder)
    summary = make_summary(rows)
    del summary["format_version"]  # the first versions did not say
    write_json(folder, "summary.json", summary)
    with pytest.raises(UserError, match="older version"):
        read_results_folder(folder)
    assert not (folder / "report.html").exists()


def drop_training_rows(folder):
    write_sequences(folder, [row for row in training_rows()[0] if row["row"] < 16])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "summary.json").unlink(), "summary.json is missing"),
        (lambda f: (f / "kernel.safetensors").unlink(), "kernel.safetensors is missing"),
        (lambda f: (f / "training_history.json").unlink(), "training_history.json is missing"),
        (lambda f: (f / "summary.json").write_text('{"a": 1,\n oops'), r"not valid JSON \(line 2, column 2"),
        (lambda f: (f / "run.json").write_text("[]"), "the file should be an object"),
        (lambda f: (f / "run.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda f: (f / "summary.json").write_text("[" * 100_000), "nested too deeply|not valid JSON"),
        (lambda f: (f / "training_history.json").write_text("[1]"), r"\[0\] should be an object"),
        (lambda f: (f / "training_history.json").write_text("[{}]"), r"\[0\].step is missing"),
        (lambda f: (f / "summary.json").write_text('{"a": 1' + "0" * 5000 + "}"), "not valid JSON"),
        (
            edit_json("summary.json", lambda s: s["predicted"]["split"].pop("total") and None),
            "predicted.split.total is missing",
        ),
        (edit_json("summary.json", lambda s: s | {"analyses": [1, 2]}), "analyses should be an object"),
        (edit_json("summary.json", lambda s: s | {"analyses": {"unheard_of": {}}}), "analyses.unheard_of is no field"),
        (
            edit_json("summary.json", lambda s: s | {"analyses": {"buffers": {}}}),
            "analyses.buffers.quantities is missing",
        ),
        (edit_json("summary.json", lambda s: s | {"analyses": {"buffers": "text"}}), "analyses.buffers should be"),
        (
            edit_json("summary.json", lambda s: s | dict.fromkeys(s.keys() - {"format_version"}, "odd")),
            "checkpoint should be",
        ),
        (edit_json("run.json", lambda r: r | {"self_checks": "none"}), "self_checks should be a"),
        (lambda f: (f / "sequences.parquet").write_bytes(b"PAR1 not really"), "not a readable parquet"),
        (
            lambda f: write_sequences(f, [{"buffer": "training", "row": 0}]),
            "lacks the columns prompt_index, prompt",
        ),
        (
            lambda f: (f / "kernel.safetensors").write_bytes(b"\x08" + b"\0" * 20),
            "not a readable safetensors",
        ),
        (
            lambda f: save_file({"other": np.ones(3)}, f / "kernel.safetensors"),
            "neither fisher nor entropy_fisher",
        ),
        (drop_training_rows, "different analyses"),
        (
            lambda f: write_sequences(f, [r | {"row": r["row"] + 1} for r in training_rows()[0]]),
            "not numbered 0",
        ),
    ],
)
def test_broken_folders_give_one_clear_line(tmp_path, change, words):
    folder = build_results(tmp_path / "results")
    change(folder)
    with pytest.raises(UserError, match=words) as caught:
        write_report(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent", "no results folder"), ("empty", "is not the results folder"), ("a.part", "unfinished")],
)
def test_folders_that_are_no_results(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.part").mkdir()
    with pytest.raises(UserError, match=words):
        write_report(tmp_path / name)
