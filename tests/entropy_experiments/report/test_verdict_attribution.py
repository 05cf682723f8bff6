"""Who is named, by which number and how surely; and what the training side's own noise covers."""

import copy

import numpy as np

from entropy_experiments.records.leaving_out import LeavingOut
from entropy_experiments.records.record import validated
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.verdict import write_verdict
from entropy_experiments.report.verdict_attribution import cost_sentences, training_noise_sentence
from tests.entropy_experiments.results_fixture import make_history, make_run, make_sequences, make_summary
from tests.entropy_experiments.whole_summary import results_of, whole_summary

NOISE = {
    "value": -0.074, "standard_error": 0.012, "degrees_of_freedom": 7, "low": -0.102, "high": -0.046, "prompts": 8, "groups": 8,
}  # fmt: skip


def row(number, prompt, share, effect, completion="4"):
    return {
        "row": number, "prompt_index": prompt, "prompt": f"Say {prompt} + 1 =", "completion": completion, "reward": 1.0,
        "delta_h": share, "effect_of_leaving_out": effect,
    }  # fmt: skip


ROWS = [
    row(0, 3, -9e-3, -1e-3), row(1, 3, -1e-3, -2e-3), row(2, 19, -2e-3, -6e-3), row(3, 19, 1e-3, 1e-3),
    row(4, 19, -2e-3, -6e-3),
]  # fmt: skip


def unit(rows, value, first_in, others=()):
    found = {"rows": rows, "value": value, "first_in": first_in}
    return found | {"set": {"rows": [rows, *others], "value": 2 * value, "first_in": 0.93}}


def leaving_out(headline="effect", sequence=0.73, prompt=0.81, **changes):
    first = {
        "bootstraps": 1000, "evaluation_prompts": 64,
        "sequences": {"lowering": unit([2, 4] if headline == "effect" else [0], -12e-3, sequence, [[1]]), "raising": None},
        "prompts": {"lowering": unit([2, 3, 4], -11e-3, prompt, [[0, 1]]), "raising": None},
    }  # fmt: skip
    own = 0.25 if headline == "effect" else 0.02
    first |= {"distinct": 4}
    return {
        "unit": "nats per token", "sum_of_effects": -0.014, "early_above": 0.1, "by_prompt": [],
        "headline": headline, "own_part_of_second_moment": own, "slope_of_real": 1.05, "first": first, **changes
    }  # fmt: skip


def costs(content, rows=ROWS):
    return cost_sentences(rows, (), validated(LeavingOut, content, "summary.json"))


def noise_sentence(**content):
    return training_noise_sentence(validated(Summary, whole_summary(**content), "summary.json"))


def test_early_the_effect_names_and_late_the_share_does():
    early, late = (costs(leaving_out(by)) for by in ("effect", "share"))
    assert "4 lowered entropy in this step and 1 raised it (by their effects of leaving them out" in early[0].text
    assert "25% of Adam's second moment is this step's own gradient" in early[0].text
    assert "sequence 2 of prompt 19 with its 1 equal ones" in early[0].text
    assert (
        "−12.00 ×10⁻³" in early[0].text.replace("−12.0 ", "−12.00 ")
        and "entropy with it minus without it" in early[0].text
    )
    assert "first in 73% of 1000 bootstraps over evaluation prompts" in early[0].text
    assert "prompt 19 cost most" in early[1].text and "first in 81%" in early[1].text
    assert "sequence 0 of prompt 3 (" in late[0].text and "(accounting share; first in 73%" in late[0].text
    assert {told.tone for told in (*early, *late)} == {"plain"}


def test_who_is_named_has_the_interval_of_its_number():
    content = leaving_out()
    for unit_of in content["first"]["sequences"], content["first"]["prompts"]:
        unit_of["lowering"] |= {"low": -0.02, "high": -0.004}
        unit_of["lowering"]["set"] |= {"low": -0.03, "high": -0.01}
    assert all("[\N{MINUS SIGN}20.0, \N{MINUS SIGN}4.0] ×10⁻³" in str(one) for one in costs(content))
    for unit_of in content["first"]["sequences"], content["first"]["prompts"]:
        unit_of["lowering"]["first_in"] = 0.3
    assert all("[\N{MINUS SIGN}30, \N{MINUS SIGN}10] ×10⁻³" in str(one) for one in costs(content))


def test_without_a_majority_the_group_is_named_and_nobody_alone():
    found = costs(leaving_out(sequence=0.44, prompt=0.4))
    assert "no single sequence cost most: none is first in more than half of 1000 bootstraps" in found[0].text
    assert "in 93% it is one of the 2 sequences 2 and 1, together −24.0" in found[0].text
    assert "the one that cost most" not in found[0].text and "answered by" not in found[0].text
    assert "no single prompt cost most" in found[1].text and "prompts 3 and 19" in found[1].text
    same = leaving_out(sequence=0.44)
    same["first"]["sequences"]["lowering"]["set"]["rows"] = [[2, 4], [3]]
    assert "the 2 sequences 2 and 3 of prompt 19" in costs(same)[0].text
    many = [row(i, i % 3, -1e-3, -1e-3) for i in range(12)]
    same["first"]["sequences"]["lowering"]["set"]["rows"] = [[i] for i in range(12)]
    same["first"]["sequences"]["lowering"]["rows"] = [0]
    assert "it is one of 12 sequences of 3 prompts" in costs(same, many)[0].text


def test_what_is_not_known_is_said():
    unsure = leaving_out()
    unsure["first"] = {"reason": "the training rows were not kept in memory"}
    found = costs(unsure)
    assert "how surely is not known: the training rows were not kept" in found[0].text
    assert {told.tone for told in found} == {"warning"}
    slope = costs(leaving_out(slope_of_real=3.1))[1]
    assert "with a slope of 3.1 only" in slope.text and slope.tone == "warning"
    first_step = leaving_out("share", own_part_of_second_moment=1.0)
    assert "at the optimizer's first step its sign alone counts" in costs(first_step)[0].text


def test_training_noise_says_what_it_covers_and_what_not():
    told = noise_sentence(training_noise=NOISE, leaving_out=leaving_out())
    assert told is not None and told.tone == "plain"
    assert (
        "Another draw of this training buffer (8 prompts) would have moved the predicted change by ±0.012" in told.text
    )
    assert "95% interval of the change: −0.10 to −0.046" in told.text and "not that of the training buffer" in told.text
    other_way = noise_sentence(training_noise=NOISE | {"high": 0.01}, leaving_out=leaving_out())
    assert other_way is not None and other_way.tone == "warning" and "the other way" in other_way.text
    unknown = noise_sentence(training_noise=None, leaving_out=leaving_out())
    assert unknown is not None and unknown.tone == "warning" and "is not known" in unknown.text
    assert noise_sentence() is None, "no step"
    grouped = noise_sentence(training_noise=NOISE | {"prompts": 300, "groups": 40}, leaving_out=leaving_out())
    assert grouped is not None and "(300 prompts in 40 groups)" in grouped.text


def test_the_verdict_holds_these_sentences():
    summary = copy.deepcopy(make_summary(make_sequences(np.random.default_rng(0))[0]))
    summary |= {"training_noise": NOISE, "leaving_out": leaving_out()}
    texts = [str(s) for s in write_verdict(results_of(summary, make_history(), make_run()["self_checks"], ROWS))]
    assert np.sum(["Another draw of this training buffer" in text for text in texts]) == 1
    assert np.sum(["first in 73%" in text for text in texts]) == 1


def test_of_how_many_the_sign_is_told_is_said():
    rows = [
        row | {"effect_low": row["effect_of_leaving_out"] - 2e-3, "effect_high": row["effect_of_leaving_out"] + 1.5e-3}
        for row in ROWS
    ]
    text = costs(leaving_out(), rows)[0].text
    assert (
        "4 lowered entropy in this step and 1 raised it, with zero outside the 95% interval for 3 and 0 of them (by their"
        in text
    )
