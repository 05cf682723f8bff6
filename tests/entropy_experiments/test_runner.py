"""One analysis from checkpoint to folder: its numbers, its self-checks, what it refuses, and that it leaves no debris."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from entropy_experiments import entropy_runner
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import (
    Buffers,
    choose_evaluation_rows,
    draw_buffers,
    sample_evaluation_batch,
    sample_training_batch,
)
from entropy_experiments.entropy_runner import run_fisher_analysis
from rl_training.configuration import load_config
from tests.entropy_experiments.small_analysis import config


@pytest.fixture(scope="module")
def analysis(small_analysis):
    return small_analysis


def test_the_folder_holds_what_the_contract_says(analysis):
    folder = analysis.folder
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml", "run.json", "summary.json", "sequences.parquet", "kernel.safetensors", "training_history.json",
        "evaluation_set.json", "figures", "report.html", "leave_one_out.parquet", "SHA256SUMS",
    }  # fmt: skip
    run = json.loads((folder / "run.json").read_text())
    assert len(run["self_checks"]) == 11 and all(check["passed"] for check in run["self_checks"])
    assert run["versions"]["torch"] and run["stages"] and run["seconds"] > 0
    assert not list(folder.parent.glob("*.part"))
    replayed = load_config(FisherAnalysisConfig, folder / "config.yaml")
    assert replayed == config()


def test_shares_follow_from_the_kernel_by_the_documented_formula(step_analysis):
    """delta h_i = lr (1 - beta1)/(1 - beta1^t) c w_i mean_eval K_H(:, i), from the files alone."""
    analysis = step_analysis
    kernels = load_file(analysis.folder / "kernel.safetensors")
    rows = pq.read_table(analysis.folder / "sequences.parquet").to_pylist()
    training = [r for r in rows if r["buffer"] == "training"]
    summary = json.loads((analysis.folder / "summary.json").read_text())
    weights = np.array([r["weight"] for r in training])
    factor = 1e-3 * (1 - 0.9) / (1 - 0.9**5) * summary["attribution"]["clip_coefficient"]
    expected = factor * weights * kernels["entropy_fisher"].double().mean(0).numpy()
    np.testing.assert_allclose([r["delta_h"] for r in training], expected, rtol=1e-3, atol=1e-9)
    total = sum(r["delta_h"] for r in training)
    assert total == pytest.approx(summary["attribution"]["delta_h_batch"], rel=1e-4)
    horizon = [sum(0.9**j * (1 - 0.9**5) / (1 - 0.9 ** (5 + j)) for j in range(500))]
    assert summary["attribution"]["horizon_factor"] == pytest.approx(horizon[0], rel=1e-6)
    lost = sum(r["delta_h_lost"] for r in rows if r["buffer"] == "evaluation")
    assert lost == pytest.approx(summary["predicted"]["rao_blackwell"]["total"]["value"], rel=1e-4)


def test_score_function_prediction_equals_the_kernel_formula(step_analysis):
    """delta H_batch = -factor (1/n) sum_t (S_t - b_t) sum_i w_i K1(t, i), b_t the mean of the other sequences."""
    analysis = step_analysis
    rows = pq.read_table(analysis.folder / "sequences.parquet").to_pylist()
    scores = np.array([r["score"] for r in rows if r["buffer"] == "evaluation"])
    weights = np.array([r["weight"] for r in rows if r["buffer"] == "training"])
    fisher = load_file(analysis.folder / "kernel.safetensors")["fisher"].double().numpy()
    n = len(scores)
    centred = scores - (scores.sum() - scores) / (n - 1)
    factor = 1e-3 * (1 - 0.9) / (1 - 0.9**5) * analysis.summary.attribution.clip_coefficient
    from_kernel = -factor * (centred / n) @ fisher @ weights
    predicted = analysis.summary.predicted_per_completion["score_function"].batch.value
    assert from_kernel == pytest.approx(predicted, rel=1e-3), (
        "the kernel's P or the baseline differs from the prediction's"
    )


def test_the_checkpoints_p_and_the_steps_own_differ_but_shares_do_not(analysis, step_analysis):
    other = step_analysis
    again, found = other.numbers.step.attribution, analysis.numbers.step.attribution
    torch.testing.assert_close(again.shares, found.shares, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(other.numbers.kernels.fisher, analysis.numbers.kernels.fisher, rtol=1e-2)
    assert found.batch_change == pytest.approx(
        analysis.numbers.step.predictions.per_token["rao_blackwell"]["batch"].value, rel=1e-4
    ), "the shares must add up to the batch part that the report shows"


def test_parts_sum_to_the_total_and_errors_are_of_means(analysis):
    for predicted in (analysis.numbers.step.predictions.per_token, analysis.numbers.step.predictions.per_completion):
        for parts in predicted.values():
            total = sum(parts[name].value for name in ("batch", "momentum", "weight_decay"))
            assert total == pytest.approx(parts["total"].value, rel=2e-3, abs=1e-7)
    contributions = analysis.numbers.step.predictions.contributions.numpy() * 16
    spread = contributions.std(ddof=1)
    error = analysis.numbers.step.predictions.per_token["rao_blackwell"]["total"].standard_error
    assert error == pytest.approx(spread / 4, rel=0.01), "16 prompts: the error of the mean is a quarter of the spread"


def test_first_order_becomes_exact_as_the_step_shrinks(analysis):
    split = analysis.numbers.step.predictions.per_token["split"]["total"].value
    gaps = {m.scale: abs(m.snis.change / (m.scale * split) - 1) for m in analysis.numbers.step.measured}
    assert gaps[0.25] < 0.75 * gaps[1.0] or gaps[1.0] < 2e-3
    fixed = analysis.numbers.step.predictions.per_token["fixed_prefix"]["total"].value
    quarter = next(m for m in analysis.numbers.step.measured if m.scale == 0.25)
    assert quarter.fixed_prefix.change == pytest.approx(0.25 * fixed, rel=0.1)


def test_the_model_is_left_as_it_was(tiny_run):
    checkpoint = load_checkpoint(tiny_run)
    plan = plan_sampling(checkpoint, config())
    before = {name: p.detach().clone() for name, p in checkpoint.model.named_parameters()}
    rows = choose_evaluation_rows(plan, config())
    training = sample_training_batch(checkpoint, plan, config(), keep_out=rows)
    evaluation = sample_evaluation_batch(checkpoint, plan, config(), rows)
    entropy_runner.analyze_buffers(checkpoint, plan, config(), Buffers(evaluation, training))
    assert all(torch.equal(p, before[name]) for name, p in checkpoint.model.named_parameters())


def test_another_learning_rate_scales_the_step_and_leaves_the_optimizer_alone(tiny_run):
    from entropy_core.gradients import trainable_parameters
    from entropy_experiments.step.optimizer_step import take_next_step

    checkpoint = load_checkpoint(tiny_run)
    parameters = trainable_parameters(checkpoint.model)
    gradient = {name: torch.full_like(p, 1e-3) for name, p in parameters.items()}
    moments = {name: state.exp_avg.clone() for name, state in checkpoint.optimizer.items()}
    own = take_next_step(checkpoint.model, checkpoint.optimizer, gradient, 1.0)
    double = take_next_step(checkpoint.model, checkpoint.optimizer, gradient, 1.0, learning_rate=2e-3)
    for name in parameters:
        torch.testing.assert_close(double.update.batch[name], 2 * own.update.batch[name])
        torch.testing.assert_close(double.parameter_delta[name], 2 * own.parameter_delta[name], rtol=1e-3, atol=1e-7)
        assert double.state[name].lr == 2e-3 and own.state[name].lr == 1e-3
    assert all(state.lr == 1e-3 for state in checkpoint.optimizer.values())
    assert all(torch.equal(checkpoint.optimizer[name].exp_avg, m) for name, m in moments.items())


@pytest.mark.long
def test_same_seed_same_numbers(analysis, tiny_run, tmp_path):
    again = run_fisher_analysis(tiny_run, config(), folder=tmp_path / "again")
    for name, kernel in load_file(analysis.folder / "kernel.safetensors").items():
        torch.testing.assert_close(load_file(again.folder / "kernel.safetensors")[name], kernel, rtol=1e-5, atol=1e-7)
    other = run_fisher_analysis(tiny_run, config("seed=1"), folder=tmp_path / "other")
    assert other.evaluation.completion_ids != again.evaluation.completion_ids


def test_drawing_the_evaluation_buffer_reads_no_reward(tiny_run):
    checkpoint = load_checkpoint(tiny_run)
    plan = plan_sampling(checkpoint, config())

    def forbidden(**_):
        raise AssertionError("the evaluation buffer looked at a reward")

    plan.task.reward_functions[:] = [forbidden]
    rollouts = sample_evaluation_batch(checkpoint, plan, config(), choose_evaluation_rows(plan, config()))
    assert len(rollouts) == 16 and set(rollouts.reward) == {None}
    heldout = {row["prompt_index"] for row in plan.task.heldout}
    assert set(rollouts.prompt_index) == heldout, "16 held-out prompts, one completion each"


def test_no_reward_is_read_before_both_buffers_are_drawn(tiny_run):
    """The training buffer is the run's own, so that nothing has to be scored; then rewards that raise change nothing."""
    from_run = config("entropy_analysis.sampling.train_prompts=from_run")
    checkpoint = load_checkpoint(tiny_run)
    drawn = []
    for broken in (False, True):
        plan = plan_sampling(checkpoint, from_run)
        if broken:
            plan.task.reward_functions[:] = [_forbidden]
            for row in plan.task.heldout:
                row["answer"] = _Untouchable()
        drawn.append(draw_buffers(checkpoint, plan, from_run)[0])
    assert drawn[0].completion_ids == drawn[1].completion_ids and set(drawn[1].reward) == {None}


def _forbidden(**_):
    raise AssertionError("a reward was read")


class _Untouchable:
    """An answer that nobody may look at."""

    def __getattr__(self, name):
        raise AssertionError("an answer was read")


@pytest.mark.long
def test_the_evaluation_set_is_stored_and_fixed_sets_are_the_same_at_every_checkpoint(tiny_run, tmp_path):
    fixed = config("entropy_analysis.sampling.eval_prompts=fixed_set", "entropy_analysis.eval_batch_size=10")
    stored = []
    for step in (2, 4):
        result = run_fisher_analysis(tiny_run / f"checkpoint-{step}", fixed, folder=tmp_path / str(step))
        stored.append(json.loads((result.folder / "evaluation_set.json").read_text()))
        assert stored[-1]["prompt_index"] == result.evaluation.prompt_index and stored[-1]["source"] == "heldout"
    assert stored[0] == stored[1] and len(stored[0]["prompt_index"]) == 10
    checkpoint = load_checkpoint(tiny_run)
    plan = plan_sampling(checkpoint, fixed)
    assert stored[0]["prompt_index"] == [row["prompt_index"] for row in plan.task.heldout[:10]]
    chosen = [
        [row["prompt_index"] for row in choose_evaluation_rows(plan, config(f"seed={seed}"))] for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2], "random prompts follow from the seed"


@pytest.mark.long
def test_same_prompts_and_disjoint_prompts(tiny_run, tmp_path):
    same = run_fisher_analysis(
        tiny_run, config("entropy_analysis.sampling.same_prompts=true"), folder=tmp_path / "same"
    )
    assert set(same.evaluation.prompt_index) <= set(same.training.rollouts.prompt_index)
    assert same.summary.kernel.same_prompt_pairs > 0
    apart = run_fisher_analysis(
        tiny_run, config("entropy_analysis.sampling.eval_split=train"), folder=tmp_path / "apart"
    )
    assert not set(apart.evaluation.prompt_index) & set(apart.training.rollouts.prompt_index)


def test_the_buffer_of_the_run_itself(tiny_run, tmp_path):
    result = run_fisher_analysis(
        tiny_run, config("entropy_analysis.sampling.train_prompts=from_run"), folder=tmp_path / "from_run"
    )
    from rl_training.run.rollouts import read_rollouts

    kept = [row for row in read_rollouts(tiny_run, 4) if row.status != "rejected"]
    assert result.training.rollouts.completion_ids == [list(row.completion_ids) for row in kept]
    np.testing.assert_allclose(result.training.weights, [row.weight for row in kept], rtol=1e-6)
