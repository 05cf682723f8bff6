"""The verdict says what the numbers say, and says when they say nothing."""

import copy

import numpy as np
import pytest

from entropy_experiments.console.tables import outcome_facts
from entropy_experiments.records.record import validated
from entropy_experiments.records.run_record import CheckRecord
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.check_words import check_sentences
from entropy_experiments.report.outcome import analysis_outcome
from entropy_experiments.report.tables import estimator_table
from entropy_experiments.report.verdict import (
    part_sentence,
    prediction_sentences,
    write_verdict,
)
from entropy_experiments.report.verdict_attribution import cost_sentences
from entropy_experiments.statistics.agreement import paired_agreement
from entropy_experiments.statistics.confidence import ALIKE, NOT_FROM_ZERO
from tests.entropy_experiments.results_fixture import SERIES, make_history, make_run, make_sequences, make_summary
from tests.entropy_experiments.whole_summary import estimate, results_of, whole_summary


@pytest.fixture(scope="module")
def rows():
    return make_sequences(np.random.default_rng(0))[0]


@pytest.fixture
def summary(rows):
    return copy.deepcopy(make_summary(rows))


def record(summary):
    return validated(Summary, summary, "summary.json")


def said_of(summary):
    return prediction_sentences(record(summary))


def checked(*checks):
    return check_sentences(validated(list[CheckRecord], list(checks), "run.json"))


def verdict(summary, history, checks, training=()):
    return write_verdict(results_of(summary, history, checks, training))


def test_prediction_that_agrees(summary):
    (sentence,) = said_of(summary)
    t = 2.0395  # Student's, on 31 degrees of freedom
    for value, error in ((-0.074, 0.018), (-0.08, 0.022)):
        assert f"{value:.3f} [{value - t * error:.3f}, {value + t * error:.3f}]".replace("-", "−") in sentence.text
    low, high = (0.006 + sign * t * 0.005 for sign in (-1, 1))
    assert f"They agree: they differ by +0.006 [{low:.3f}, +{high:.3f}]".replace("-", "−") in sentence.text
    assert f"a gap of up to {high / 0.08:.0%}" in sentence.text
    assert sentence.tone == "good"


def disagreeing(summary, gap, error=0.002):
    summary["agreement"]["rao_blackwell"] = paired_agreement(gap, gap + error * SERIES).as_dict()
    return said_of(summary)[0]


def test_prediction_that_does_not_agree(summary):
    """Small beside the change it is a warning, large it is bad; in quadrature neither would count (0.028)."""
    small, large = disagreeing(summary, 0.012), disagreeing(summary, -0.05)
    assert "do NOT agree" in small.text and "15% of the measured change" in small.text and small.tone == "warning"
    assert "do NOT agree" in large.text and large.tone == "bad"


def test_results_that_do_not_hold_the_paired_error_say_nothing_of_agreement(summary):
    summary["agreement"] = {}
    (sentence,) = said_of(summary)
    assert (
        "error of their difference" in sentence.text
        and "cannot be said" in sentence.text
        and sentence.tone == "warning"
    )


def test_a_run_that_recorded_no_loss_is_said_to_be_analysed_as_dr_grpo(summary):
    def told(changed):
        return any(
            "does not say which loss its run had: the step analysed is Dr. GRPO's" in s.text for s in said_of(changed)
        )

    assert not told(summary)
    plain_trl = {**summary, "policy": {**summary["policy"], "training": None}}
    assert told(plain_trl)
    training = {**summary["sampling"]["training"], "rounds": 0}  # sequences that the user gave, with their weights
    assert not told({**plain_trl, "sampling": {**summary["sampling"], "training": training}})


def test_a_wide_interval_of_the_difference_is_not_agreement(summary):
    """A gap of 0 ± 40% of the change holds 0 and says nothing; it was called agreement, in green."""
    summary["agreement"]["rao_blackwell"] = paired_agreement(0.0, 0.016 * SERIES).as_dict()
    sentence = said_of(summary)[0]
    assert f"They {ALIKE}" in sentence.text and "a gap of up to 41%" in sentence.text
    assert "agree" not in sentence.text and sentence.tone == "plain"


def test_agreement_of_noise_is_called_noise(summary):
    summary["predicted"]["rao_blackwell"]["total"] = estimate(-0.074, 0.05)
    assert any(NOT_FROM_ZERO in sentence.text for sentence in said_of(summary))


def test_small_effective_sample_is_named(summary):
    summary["actual"]["snis"]["effective_sample_size"] = 15.9
    assert "15.9 of 32" in said_of(summary)[-1].text


def test_a_measurement_that_is_not_to_be_trusted_agrees_with_nothing(summary):
    """Its error is not known, so that of the difference is not; it was said to agree, in green, and the console stopped there."""
    summary["actual"]["snis"] |= {"effective_sample_size": 9.0, "trustworthy": False}
    summary["actual"]["snis"] |= dict.fromkeys(("low", "high", "degrees_of_freedom"))
    for error in (0.005, 0.0005):
        summary["agreement"]["rao_blackwell"] = paired_agreement(0.006, 0.006 + error * SERIES).as_dict()
        first = said_of(summary)[0]
        assert "Whether they agree cannot be said: the measurement is not to be trusted" in first.text
        assert "They" not in first.text and first.tone == "warning"
    outcome = analysis_outcome(results_of(summary, make_history(), make_run()["self_checks"], ()))
    assert outcome.agreement is None
    assert next(value for name, value, _ in outcome_facts(outcome) if name == "Measured change").count("agree") == 0
    z = {row[0]: row[-1].text for row in estimator_table(record(summary)).rows}
    assert [text for label, text in z.items() if "Fixed prefix" not in label] == ["not known"] * (len(z) - 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["actual"].pop("snis"), "not measured"),
        (lambda s: (s["actual"]["snis"].update(estimate(-0.08, None)), s.update(agreement={})), "cannot be said"),
        (lambda s: s["predicted"]["rao_blackwell"]["total"].update(value=0.0), "learning rate 0"),
        (lambda s: s.update(predicted={}), "no predicted change"),
        (
            lambda s: s.update(predicted={"fixed_prefix": s["predicted"]["fixed_prefix"]}),
            "no predicted change",
        ),
    ],
)
def test_missing_numbers_are_named(summary, change, words):
    change(summary)
    sentences = said_of(summary)
    assert words in sentences[0].text and sentences[0].tone in {"warning", "bad"}


def test_fixed_prefix_never_stands_in_for_delta_h(summary):
    del summary["predicted"]["rao_blackwell"]
    assert record(summary).estimator == "split"
    summary["predicted"] = {"fixed_prefix": summary["predicted"]["fixed_prefix"]}
    assert record(summary).estimator is None


def test_part_sentence_names_the_largest_and_what_opposes_it(summary):
    assert "came from momentum (earlier batches): −0.061 [−0.094, −0.028]" in part_sentence(record(summary)).text
    batch = summary["predicted"]["rao_blackwell"]["batch"]
    batch |= estimate(0.2, batch["standard_error"])
    text = part_sentence(record(summary)).text
    assert "came from this step's batch: +0.200 [+0.189, +0.211]" in text
    assert "momentum (earlier batches) and weight decay worked against it" in text


def test_no_part_is_called_the_largest_where_intervals_overlap(summary):
    """−0.061 against −0.055 ± 0.02 is no order; it was said as if it were."""
    summary["predicted"]["rao_blackwell"]["batch"] = estimate(-0.055, 0.02)
    text = part_sentence(record(summary)).text
    assert "cannot be said" in text and "came from" not in text and "−0.055 [−0.096, −0.014]" in text


def test_cost_sentences_name_sequence_and_prompt(rows):
    training = [row for row in rows if row["buffer"] == "training"]
    first, second = (sentence.text for sentence in cost_sentences(training, (), None))
    worst = min(training, key=lambda row: row["delta_h"])
    assert f"sequence {worst['row']} of prompt {worst['prompt_index']}" in first
    assert f"{worst['delta_h'] * 1e3:.3f}".replace("-", "−") in first
    assert f"{sum(row['delta_h'] < 0 for row in training)} lowered entropy" in first
    sums = {p: sum(row["delta_h"] for row in training if row["prompt_index"] == p) for p in range(8)}
    assert f"prompt {min(sums, key=sums.get)} cost most" in second
    assert "how surely is not known" in first and "accounting share" in first, "folders of earlier versions"
    assert "im_start" not in first + second, "what all prompts share should be left out"


def test_cost_sentences_without_shares():
    assert "not known" in cost_sentences([], (), None)[0].text
    rising = [{"row": 0, "prompt_index": 0, "prompt": "p", "completion": "c", "reward": 1.0, "delta_h": 0.1}]
    assert "none cost entropy" in cost_sentences(rising, (), None)[0].text


def test_text_in_sentences_cannot_act_on_a_terminal():
    row = {
        "row": 0,
        "prompt_index": 0,
        "prompt": "a\x1b[31m\x00\u202e",
        "completion": "x" * 10_000,
        "reward": 0.0,
        "delta_h": -0.1,
    }
    text = cost_sentences([row], (), None)[0].text
    assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text and "⟨U+001B⟩" in text
    assert "9,940 characters left out" in text and len(text) < 500


def test_checks_say_what_they_let_through():
    """ "optimizer entries recognised: passed" beside a tolerance of 80% said more than it knew."""
    checks = make_run()["self_checks"]
    narrow, wide = checked(*checks)
    assert narrow.text.startswith("All 7 self-checks passed: rows_sum_to_autograd (3.1e−7, tolerance 1e−5), ")
    assert wide.text.startswith(
        "Passed within wide tolerances, which let much through: surprisal_equals_entropy (0.31, tolerance 3); "
    )
    entries = {
        "name": "optimizer entries recognised",
        "value": 0.7,
        "tolerance": 0.8,
        "passed": True,
        "explanation": "x",
    }
    entries |= {"allows": "so that a few that are exchanged would have passed"}
    text = checked(*checks, entries)[1].text
    assert (
        "optimizer entries recognised (0.7, tolerance 0.8), so that a few that are exchanged would have passed" in text
    )
    for check in [*checks, entries]:
        assert f"tolerance {check['tolerance']:g}".replace("-0", "-").replace("-", "−") in narrow.text + text, check[
            "name"
        ]
    checks[1] |= {"passed": False, "value": 0.25}
    (failed,) = checked(*checks)
    assert failed.tone == "bad" and "1 of 7 self-checks FAILED: kernel_row_sums (0.25, tolerance 0.001)" in failed.text
    checks[1]["value"] = None
    assert "kernel_row_sums (not a finite number, tolerance 0.001)" in checked(*checks)[0].text
    assert checked()[0].tone == "warning"


def test_failed_check_comes_first_and_passed_checks_last(rows, summary):
    checks = make_run()["self_checks"]
    training = [row for row in rows if row["buffer"] == "training"]
    assert verdict(summary, make_history(), checks, training)[-2].text.startswith("All 7")
    checks[0]["passed"] = False
    assert "FAILED" in verdict(summary, make_history(), checks, training)[0].text


def test_verdict_of_nothing_is_a_list_of_warnings():
    assert all(sentence.tone in {"warning", "bad"} for sentence in verdict(whole_summary(), [], []))


def test_noise_is_claimed_of_nothing(rows, summary):
    """Every error ten times as large, and a log that wanders: no sentence says that something fell, agrees or was the largest."""

    def louder(tree):
        if isinstance(tree, dict):
            if "standard_error" in tree and "value" in tree:
                tree |= estimate(tree["value"], 10 * tree["standard_error"])
            for branch in tree.values():
                louder(branch)

    louder(summary)
    summary["agreement"]["rao_blackwell"] = paired_agreement(0.006, 0.006 + 0.05 * SERIES).as_dict()
    rng = np.random.default_rng(1)
    history = [
        {
            "step": k,
            "entropy": 1 + rng.normal(),
            "reward": rng.random(),
            "probe/predicted": rng.normal(),
            "probe/measured": rng.normal(),
        }
        for k in range(12)
    ]
    text = " ".join(sentence.text for sentence in verdict(summary, history, make_run()["self_checks"]))
    for claim in (
        "fell",
        "rose",
        "They agree",
        "do NOT agree",
        "came from",
        "worked against",
        "correlation 0",
        "correlation −",
    ):
        assert claim not in text, claim
    for doubt in (
        "showed no clear change",
        ALIKE,
        NOT_FROM_ZERO,
        "cannot be said",
        "undetermined",
    ):
        assert doubt in text, doubt
