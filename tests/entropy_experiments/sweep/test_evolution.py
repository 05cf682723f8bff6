"""Evolution over checkpoints: planted runs come back, standard errors are right, and gaps say why they are gaps."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from entropy_experiments.records.analysis_results import AnalysesRecord
from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.record import json_of, validated
from entropy_experiments.records.summary import ActualRecord
from entropy_experiments.sweep.evolution.cluster_flow import cluster_flow, cluster_likeness
from entropy_experiments.sweep.evolution.evolution import describe_evolution
from entropy_experiments.sweep.evolution.evolution_rows import checkpoint_row
from entropy_experiments.sweep.evolution.left_out_prompts import entropy_at, jackknifed, prompt_sums
from entropy_experiments.sweep.evolution.reward_price import price_between
from entropy_experiments.sweep.evolution.training_kernel import kernel_size, training_structure
from tests.entropy_experiments.planted_run import PROMPTS, A, B, planted_run


@pytest.fixture(scope="module")
def whole():
    folders, history = planted_run(12)
    return folders, describe_evolution(folders, history, permutations=199)


def test_entropy_and_its_predicted_path(whole):
    folders, evolution = whole
    assert [row.step for row in evolution.checkpoints] == list(range(12))
    by_hand = [sum(r["entropy_sum"] for r in f.evaluation) / sum(r["length"] for r in f.evaluation) for f in folders]
    path = evolution.path
    assert [x.value for x in path.observed] == pytest.approx([h - by_hand[0] for h in by_hand])
    totals = [f.summary.predicted["rao_blackwell"].total.value for f in folders]
    assert [x.value for x in path.expected] == pytest.approx(np.cumsum([0, *totals[:-1]]).tolist())
    z = evolution.whole.difference
    assert abs(z.value) < 3 * z.standard_error, "planted predictions are what happens"
    assert evolution.whole.parts.momentum.value == pytest.approx(0.75 * sum(totals[:-1]))
    assert_json(evolution)


def test_a_biased_prediction_is_seen():
    folders, history = planted_run(12, bias=0.5)
    whole = describe_evolution(folders, history, permutations=19).whole
    assert abs(whole.difference.value) > 3 * whole.difference.standard_error
    assert whole.expected.value == pytest.approx(0.5 * describe(planted_run(12)).expected.value, rel=1e-6)


def assert_json(evolution):
    """It is JSON without NaN, and is read back as it was."""
    text = json.dumps(json_of(evolution), allow_nan=False)
    assert validated(Evolution, json.loads(text), "evolution.json") == evolution


def describe(run):
    return describe_evolution(*run, permutations=19).whole


def test_gaps_between_checkpoints_are_bridged_evenly():
    """Every third checkpoint: rates r(a), r(b) three steps apart add up to 3 r(a) + (r(b) - r(a))."""
    folders, history = planted_run(12, every=3)
    evolution = describe_evolution(folders, history, permutations=19)
    rates = [f.summary.predicted["rao_blackwell"].total.value for f in folders]
    expected = [2 * rates[k] + rates[k + 1] for k in range(len(rates) - 1)]
    assert [c.expected.value for c in evolution.changes] == pytest.approx(expected)
    assert evolution.whole.expected.value == pytest.approx(sum(expected))
    parts = {"batch": 0.2, "momentum": 0.75, "weight_decay": 0.05}
    found = {name: getattr(evolution.whole.parts, name).value for name in parts}
    assert found == pytest.approx({k: share * sum(expected) for k, share in parts.items()})


def test_order_of_folders_does_not_matter():
    folders, history = planted_run(5)
    forwards, backwards = (describe_evolution(order, history, permutations=19) for order in (folders, folders[::-1]))
    assert forwards == backwards
    with pytest.raises(ValueError, match="each step once"):
        describe_evolution([folders[0], folders[0]], history)


def test_slowly_turning_kernels_are_aligned_and_fast_ones_less():
    found = []
    for drift in (0.05, 0.4, 1.0):
        changes = describe_evolution(*planted_run(6, drift=drift), permutations=99).changes
        found.append(np.mean([c.alignment.value for c in changes]))
    assert found[0] > found[1] > found[2] and found[0] > 0.8 and abs(found[2]) < 0.15, found


def test_the_law_of_the_log(whole):
    law = whole[1].law.training.fit
    assert abs(law.a.value - A) < 4 * law.a.standard_error
    assert abs(law.b.value - B) < 4 * law.b.standard_error


def test_joint_jackknife_by_hand():
    """Difference of two ratios: the prompts left out together, at both checkpoints."""
    rng = np.random.default_rng(0)
    buffers = [
        [
            {
                "prompt_index": p,
                "prompt": str(p),
                "length": 5,
                "entropy_sum": 5 * x,
                "reward": None,
                "delta_h_lost": None,
            }
            for p, x in enumerate(base)
        ]
        for base in (rng.normal(size=8), rng.normal(size=8))
    ]
    sums = prompt_sums(buffers, range(8))
    found = jackknifed(lambda t: entropy_at(1)(t) - entropy_at(0)(t), sums)
    pairs = np.array([[b["entropy_sum"] / 5 for b in buffer] for buffer in buffers])
    difference = pairs[1] - pairs[0]
    assert found.value == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(8))


def test_price_has_the_sign_of_what_was_paid():
    folders, _ = planted_run(12)
    sums = prompt_sums([folders[0].evaluation, folders[-1].evaluation], range(100, 100 + PROMPTS))
    price = price_between(sums, 0, 1)
    ratio = -price.entropy_change.value / price.reward_change.value
    assert price.price.value == pytest.approx(ratio) and ratio > 0
    same = price_between(sums[[0, 0]], 0, 1)
    assert same.price.value is None and "is not significantly different from 0" in same.reason


def test_clusters_flow_by_prompt():
    prompts = np.array([1, 1, 2, 2, 3, 3])
    flow = cluster_flow([1, 1, 2, 1, 1, 2], prompts, [2, 2, 1, 1, 1, None], np.array([1, 1, 2, 2, 9, 9]))
    assert flow.prompts == 2 and flow.earlier == (1, 2) and flow.later == (1, 2)
    np.testing.assert_allclose(flow.flow, [[0.25, 0.5], [0.25, 0]])
    assert "share no prompt" in cluster_flow([1], np.array([1]), [1], np.array([2])).reason


def test_clusters_that_do_the_same_are_alike_whatever_their_numbers():
    rng = np.random.default_rng(1)
    push = rng.normal(size=(20, 2))
    left = push[:, [0, 0, 1, 1]] + 0.01 * rng.normal(size=(20, 4))
    right = push[:, [1, 0, 0, 1]] + 0.01 * rng.normal(size=(20, 4))
    found = np.array(cluster_likeness(left, [1, 1, 2, 2], right, [1, 2, 2, None]))
    assert found[0, 1] > 0.99 and found[1, 0] > 0.99 and max(abs(found[0, 0]), abs(found[1, 1])) < 0.7


def test_share_within_prompts_and_rank():
    """Four prompts whose gradients are orthogonal between prompts, equal within: everything stays within."""
    features = np.repeat(np.eye(4), 3, axis=0)
    prompts = np.repeat(np.arange(4), 3)
    found = training_structure(features @ features.T, prompts)
    assert found.same_prompt_share.value == pytest.approx(1.0)
    assert found.effective_rank.value == pytest.approx(4.0)
    assert found.same_prompt_pairs == pytest.approx(4 * 6 / (12 * 11))
    mixed = training_structure(np.ones((12, 12)), prompts)
    assert mixed.same_prompt_share.value == pytest.approx(found.same_prompt_pairs)
    norm, rank = kernel_size(np.full((5, 3), 2.0), np.arange(5))
    assert norm.value == pytest.approx(2.0) and rank.value == pytest.approx(1.0)
    alone = training_structure(np.ones((3, 3)), np.zeros(3))
    assert alone.same_prompt_share.standard_error is None and "too few prompts" in alone.same_prompt_share.reason


def test_copies_of_a_sequence_are_no_likeness_within_its_prompt():
    """Gradients that know nothing of prompts, each drawn twice: cosines of 1 stood for a prompt's own direction."""
    rows = np.random.default_rng(0).normal(size=(12, 400))
    copies, prompts = np.repeat(np.arange(12), 2), np.repeat(np.arange(4), 6)
    once = training_structure(rows @ rows.T, np.repeat(np.arange(4), 3))
    twice = rows[copies]
    found = training_structure(twice @ twice.T, prompts, copies)
    assert found.same_prompt_share.value == pytest.approx(once.same_prompt_share.value)
    assert found.same_prompt_pairs == pytest.approx(once.same_prompt_pairs)
    assert training_structure(twice @ twice.T, prompts).same_prompt_share.value > 0.9, "what it would be with them"
    folder = planted_run(1)[0][0]
    doubled = [row for row in folder.training for _ in (0, 1)]
    kernel = np.repeat(np.repeat(folder.kernels["train_fisher"], 2, 0), 2, 1)
    both = replace(folder, training=doubled, kernels=folder.kernels | {"train_fisher": kernel})
    single, double = (checkpoint_row(one).same_prompt_share.value for one in (folder, both))
    assert double == pytest.approx(single, rel=1e-6)


def test_steps_that_are_not_to_be_trusted_are_in_no_sum_and_no_correlation():
    """One measurement on a few sequences, far off: it was the sum, and took the correlation."""
    folders, history = planted_run(8)
    before = describe_evolution(folders, history, permutations=19).whole.prediction
    summary = folders[3].summary
    lost = summary.actual.snis.model_copy(update={"value": 9.0, "trustworthy": False})
    changed = summary.model_copy(update={"actual": summary.actual.model_copy(update={"snis": lost})})
    folders[3] = replace(folders[3], summary=changed)
    found = describe_evolution(folders, history, permutations=19).whole.prediction
    assert (found.steps, found.untrusted, found.compared) == (before.steps - 1, 1, before.compared - 1)
    assert found.actual.value == pytest.approx(before.actual.value - summary.actual.snis.value)
    assert found.predicted.value == pytest.approx(before.predicted.value - summary.prediction.total.value)
    assert found.correlation > 0.9


def test_poor_folders_leave_gaps_with_reasons():
    """No kernels, no rewards, no clusters, no measurement: None and a reason everywhere, never NaN."""
    folders, _ = planted_run(3)
    poor = []
    for folder in folders:
        summary = folder.summary.model_copy(update={"actual": ActualRecord(), "analyses": AnalysesRecord()})
        evaluation = [row | {"reward": None, "delta_h_lost": None} for row in folder.evaluation]
        poor.append(replace(folder, summary=summary, evaluation=evaluation, kernels={}))
    evolution = describe_evolution(poor, [])
    assert_json(evolution)
    change = evolution.changes[0]
    assert change.alignment.value is None and change.alignment.reason
    assert change.flow.flow is None and "sequence_clustering" in change.flow.reason
    assert change.expected.value is None and change.observed.value is not None
    assert change.price.price.value is None and change.price.reason
    assert evolution.law.training.fit.reason


def test_prompts_that_differ_are_left_out():
    folders, history = planted_run(3)
    other = [row | {"prompt_index": row["prompt_index"] + 1} for row in folders[2].evaluation]
    evolution = describe_evolution([*folders[:2], replace(folders[2], evaluation=other)], history, permutations=19)
    assert not evolution.comparable.same_everywhere
    # the same number with another text is another prompt
    assert evolution.comparable.prompts == 0
    assert "share no evaluation prompt" in evolution.changes[0].alignment.reason


def test_one_checkpoint_is_a_short_story():
    folders, history = planted_run(1)
    evolution = describe_evolution(folders, history)
    assert evolution.changes == () and evolution.whole.price is None
    assert_json(evolution)


def test_rewards_of_0_and_1_have_means_between_them():
    """One of eight prompts solved: the jackknife's interval began below 0."""
    folder = planted_run(1)[0][0]
    rows = [dict(row, reward=float(at == 0)) for at, row in enumerate(folder.evaluation[:8])]
    solved = checkpoint_row(replace(folder, evaluation=rows)).reward
    assert 0 <= solved.low < solved.value < solved.high <= 1
    other = [dict(row, reward=2 * row["reward"]) for row in rows]
    assert checkpoint_row(replace(folder, evaluation=other)).reward.low < 0, "of another scale nothing is known"
    folders, history = planted_run(2)
    lost = [dict(row, reward=0.0) for row in folders[0].evaluation]
    none = [replace(folder, evaluation=lost) for folder in folders]
    price = describe_evolution(none, history, permutations=19).whole.price
    assert price.reward_change.value == 0 and price.reward_change.low is None
