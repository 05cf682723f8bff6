"""A summary that cannot be of the sequences beside it is refused in one line."""

import json
import shutil

import pytest

from entropy_experiments.records.reader import read_results_folder
from rl_training.errors import UserError
from tests.entropy_experiments.results_fixture import write_json

BEYOND = 64  # training sequences of the fixture


def attribution(summary):
    return summary["analyses"]["attribution"]


def shorten_shares(summary):
    sequences = attribution(summary)["sequences"]
    for name in sequences:
        sequences[name] = sequences[name][:-1]


def name_first(summary):
    place = {"rows": [BEYOND], "value": -1.0, "first_in": 0.9, "set": {"rows": [[0]], "value": -1.0, "first_in": 0.9}}
    both = {"lowering": place, "raising": None}
    first = {"bootstraps": 10, "evaluation_prompts": 8, "sequences": both, "prompts": both, "distinct": 64}
    summary["leaving_out"] = {
        "unit": "nats per token", "sum_of_effects": 0.0, "own_part_of_second_moment": 0.1, "early_above": 0.05,
        "headline": "effect", "by_prompt": [], "slope_of_real": None, "first": first,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorten_shares, "sequences.share has 63 entries"),
        (
            lambda s: attribution(s)["evaluation"].update(contribution=[0.0], own_change=None),
            "contribution has 1 entries",
        ),
        (lambda s: attribution(s).update(top_sequences=[BEYOND]), "top_sequences names training sequence 64"),
        (lambda s: attribution(s)["tokens"]["sequences"][0].update(sequence=BEYOND), "tokens.sequences names"),
        (lambda s: s["analyses"]["sequence_clustering"].update(labels=[], spectral_labels=[]), "labels has 0 entries"),
        (lambda s: s["analyses"]["sequence_clustering"]["clusters"][0].update(medoid=BEYOND), "clusters names"),
        (lambda s: s["analyses"]["intervention"]["subsets"].__setitem__(3, [0, BEYOND]), "subsets names"),
        (
            lambda s: s["analyses"]["intervention"]["removals"]["lowering"].update(sequences=[BEYOND]),
            "removals.lowering names",
        ),
        (lambda s: s["analyses"]["weighting_schemes"]["weights"].update(run=[0.0]), "weights.run has 1 entries"),
        (name_first, "leaving_out.first names training sequence 64"),
    ],
)
def test_numbers_of_other_sequences_are_refused(whole_report, tmp_path, change, words):
    folder = tmp_path / "results"
    shutil.copytree(whole_report, folder, ignore=shutil.ignore_patterns("figures", "*.html"))
    read_results_folder(folder)
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    write_json(folder, "summary.json", summary)
    with pytest.raises(UserError, match=words) as caught:
        read_results_folder(folder)
    assert "\n" not in str(caught.value) and "different analyses" in str(caught.value)
