"""The verdict says what the numbers say, and says when they say nothing."""

import copy
import math

import numpy as np
import pytest

from entropy_experiments.report.verdict import (
    check_sentence,
    cost_sentences,
    part_sentence,
    prediction_sentences,
    primary_estimator,
    probe_sentence,
    training_sentence,
    write_verdict,
)
from entropy_experiments.statistics.agreement import paired_agreement
from tests.entropy_experiments.results_fixture import SERIES, make_history, make_run, make_sequences, make_summary


@pytest.fixture(scope="module")
def rows():
    return make_sequences(np.random.default_rng(0))[0]


@pytest.fixture
def summary(rows):
    return copy.deepcopy(make_summary(rows))


def test_training_sentence_names_both_ends():
    sentence = training_sentence(make_history())
    assert str(sentence) == (
        "In training (steps 0 to 12) entropy fell by 89%, from 1.91 to 0.21 nats per token, "
        "while mean reward went from 0.11 to 0.87."
    )


@pytest.mark.parametrize(
    ("end", "words"), [(1.98, "hardly changed, from 2 to 1.98"), (3.0, "rose by 50%"), (0.5, "fell by 75%")]
)
def test_training_sentence_directions(end, words):
    assert words in training_sentence([{"step": 2, "entropy": end}, {"step": 1, "entropy": 2.0}]).text


def test_training_sentence_of_one_step_or_none():
    assert "the only one recorded" in training_sentence([{"step": 3, "entropy": 1.5}]).text
    assert training_sentence([]).tone == "warning" and "not known" in training_sentence([{"step": 1}]).text


def test_prediction_that_agrees(summary):
    (sentence,) = prediction_sentences(summary)
    assert "−0.074 ± 0.018" in sentence.text and "−0.080 ± 0.022" in sentence.text
    low, high = (0.006 + sign * 2.0395 * 0.005 for sign in (-1, 1))  # Student's t on 31 degrees of freedom
    assert f"They agree: the difference of +0.0060 has the 95% interval {low:.4f} to +{high:.3f}".replace("-", "−") in (
        sentence.text
    )
    assert sentence.tone == "good"


def disagreeing(summary, gap, error=0.002):
    summary["agreement"]["rao_blackwell"] = paired_agreement(gap, gap + error * SERIES).as_dict()
    return prediction_sentences(summary)[0]


def test_prediction_that_does_not_agree(summary):
    """Small beside the change it is a warning, large it is bad; in quadrature neither would count (0.028)."""
    small, large = disagreeing(summary, 0.012), disagreeing(summary, -0.05)
    assert "do NOT agree" in small.text and "15% of the measured change" in small.text and small.tone == "warning"
    assert "do NOT agree" in large.text and large.tone == "bad"


def test_results_that_do_not_hold_the_paired_error_say_nothing_of_agreement(summary):
    del summary["agreement"]
    (sentence,) = prediction_sentences(summary)
    assert (
        "error of their difference" in sentence.text
        and "cannot be said" in sentence.text
        and sentence.tone == "warning"
    )


def test_agreement_of_noise_is_called_noise(summary):
    summary["predicted"]["rao_blackwell"]["total"]["standard_error"] = 0.05
    assert any("not told from zero" in sentence.text for sentence in prediction_sentences(summary))


def test_small_effective_sample_is_named(summary):
    summary["actual"]["snis"]["effective_sample_size"] = 15.9
    assert "15.9 of 32" in prediction_sentences(summary)[-1].text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["actual"].pop("snis"), "not measured"),
        (lambda s: (s["actual"]["snis"].pop("standard_error"), s.pop("agreement")), "cannot be said"),
        (lambda s: s["predicted"]["rao_blackwell"]["total"].update(value=0.0), "learning rate 0"),
        (lambda s: s.pop("predicted"), "no predicted change"),
        (
            lambda s: s.update(predicted={"fixed_prefix": s["predicted"]["fixed_prefix"]}),
            "no predicted change",
        ),
    ],
)
def test_missing_numbers_are_named(summary, change, words):
    change(summary)
    sentences = prediction_sentences(summary)
    assert words in sentences[0].text and sentences[0].tone in {"warning", "bad"}


def test_fixed_prefix_never_stands_in_for_delta_h(summary):
    del summary["predicted"]["rao_blackwell"]
    assert primary_estimator(summary) == "split"
    summary["predicted"] = {"fixed_prefix": summary["predicted"]["fixed_prefix"]}
    assert primary_estimator(summary) is None


def test_part_sentence_names_the_largest_and_what_opposes_it(summary):
    assert "came from momentum (earlier batches): −0.061 ± 0.016" in part_sentence(summary).text
    summary["predicted"]["rao_blackwell"]["batch"]["value"] = 0.2
    text = part_sentence(summary).text
    assert (
        "came from this step's batch: +0.2000" in text
        and "momentum (earlier batches) and weight decay worked against it" in text
    )


def test_cost_sentences_name_sequence_and_prompt(rows):
    training = [row for row in rows if row["buffer"] == "training"]
    first, second = (sentence.text for sentence in cost_sentences(training))
    worst = min(training, key=lambda row: row["delta_h"])
    assert f"sequence {worst['row']} of prompt {worst['prompt_index']}" in first
    assert f"{worst['delta_h'] * 1e3:.3f}".replace("-", "−") in first
    assert f"{sum(row['delta_h'] < 0 for row in training)} lowered entropy" in first
    sums = {p: sum(row["delta_h"] for row in training if row["prompt_index"] == p) for p in range(8)}
    assert f"prompt {min(sums, key=sums.get)} cost most" in second
    assert "im_start" not in first + second, "what all prompts share should be left out"


def test_cost_sentences_without_shares():
    assert "not known" in cost_sentences([])[0].text
    rising = [{"row": 0, "prompt_index": 0, "prompt": "p", "completion": "c", "reward": 1.0, "delta_h": 0.1}]
    assert "none cost entropy" in cost_sentences(rising)[0].text


def test_text_in_sentences_cannot_act_on_a_terminal():
    row = {
        "row": 0,
        "prompt_index": 0,
        "prompt": "a\x1b[31m\x00\u202e",
        "completion": "x" * 10_000,
        "reward": 0.0,
        "delta_h": -0.1,
    }
    text = cost_sentences([row])[0].text
    assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text and "⟨U+001B⟩" in text
    assert "9,940 characters left out" in text and len(text) < 500


def test_checks():
    checks = make_run()["self_checks"]
    assert check_sentence(checks).text.startswith("All 7 self-checks passed: rows_sum_to_autograd, ")
    checks[1] |= {"passed": False, "value": 0.25}
    failed = check_sentence(checks)
    assert failed.tone == "bad" and "1 of 7 self-checks FAILED: kernel_row_sums (0.25, tolerance 0.001)" in failed.text
    checks[1]["value"] = math.nan
    assert "kernel_row_sums (not a finite number, tolerance 0.001)" in check_sentence(checks).text
    assert check_sentence([]).tone == "warning"
    assert check_sentence([{"name": "odd", "passed": "yes"}]).tone == "bad", "only true counts as passed"


def test_probe_sentence_sums_steps_with_both_numbers():
    history = [{"step": s, "probe/predicted": -0.1, "probe/measured": -0.2} for s in range(3)] + [
        {"step": 9, "probe/predicted": 5.0}
    ]
    assert (
        "predicted 3 steps: the predicted changes sum to −0.300, the measured ones to −0.600"
        in probe_sentence(history).text
    )
    assert probe_sentence(history[:1]) is None


def test_failed_check_comes_first_and_passed_checks_last(rows, summary):
    checks = make_run()["self_checks"]
    training = [row for row in rows if row["buffer"] == "training"]
    assert write_verdict(summary, make_history(), checks, training)[-1].text.startswith("All 7")
    checks[0]["passed"] = False
    assert "FAILED" in write_verdict(summary, make_history(), checks, training)[0].text


def test_verdict_of_nothing_is_a_list_of_warnings():
    assert all(sentence.tone in {"warning", "bad"} for sentence in write_verdict({}, [], []))
