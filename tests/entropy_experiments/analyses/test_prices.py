"""Prices against brute force: the real optimizer's steps, plain autograd, and losses written as trainers write them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from entropy_core.directional import weights_moved
from entropy_core.entropy import Estimator, score_coefficients
from entropy_core.gradients import batch_gradients, dot, entropy_gradient, trainable_parameters
from entropy_core.interventions import (
    MOST_INTERVENTIONS,
    ON_POLICY,
    TOKEN_GRADIENTS,
    Added,
    Intervention,
    TrainingTokens,
    interventions,
)
from entropy_core.passes.settings import DEFAULT_PASSES
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.analyses import price_steps
from entropy_experiments.analyses.price_steps import PriceInputs
from entropy_experiments.analyses.prices import price_list
from entropy_experiments.records.price_results import PriceRow, PricesResult
from entropy_experiments.records.record import json_of, validated
from entropy_experiments.report.analysis_tables import TABLES
from entropy_experiments.report.figures.plots import plot_prices
from entropy_experiments.report.figures.prices import price_points
from entropy_experiments.report.figures.style import png_bytes
from entropy_experiments.report.price_finding import price_finding
from entropy_experiments.statistics.estimand import POLICY
from entropy_experiments.step import row_products
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows
from entropy_experiments.step.optimizer_step import take_next_step
from entropy_experiments.step.what_if import StepMaker
from tests.entropy_experiments.analyses.tiny_step import LONGEST, TinyStep, make_step

NO_REFERENCE = "no reference here"


@cache
def tiny() -> TinyStep:
    return make_step(learning_rate=1e-3, max_norm=0.01, settled=False)


def training_tokens(step: TinyStep, **changes: object) -> TrainingTokens:
    n = len(step.train)
    rewards = torch.arange(n).remainder(2).double()
    given = {
        "batch": step.train,
        "statistics": token_statistics(step.model, step.train),
        "weights": step.weights,
        "advantages": step.weights * n * LONGEST,
        "rewards": rewards,
        "truncated": torch.arange(n) % 5 == 0,
        "max_completion_length": LONGEST,
        "costliest": torch.arange(n),
    }
    return TrainingTokens(**(given | changes))  # type: ignore[arg-type]


def price_inputs(step: TinyStep, rewards: torch.Tensor | None = None, estimator: Estimator = "split") -> PriceInputs:
    generator = torch.Generator().manual_seed(2)
    if rewards is None:
        rewards = torch.rand(len(step.evaluation), generator=generator, dtype=torch.float64)
    return PriceInputs(
        model=step.model,
        steps=StepMaker(step.step, trainable_parameters(step.model), step.max_norm),
        tokens=training_tokens(step),
        rows=KeptRows(step.columns),
        evaluation=EvaluationSide(step.evaluation, step.statistics, dataclasses.replace(POLICY, gradient=estimator)),
        gradient_of_h=step.gradient_of_h(estimator),
        rewards=rewards,
        judged=step.evaluation.prompt_index % 2 == 1,
        passes=DEFAULT_PASSES,
    )


@cache
def priced() -> tuple[PriceInputs, PricesResult]:
    inputs = price_inputs(tiny())
    reference = TokenStatistics(inputs.tokens.statistics.logprobs - 0.1, inputs.tokens.statistics.entropies)
    return inputs, price_list(inputs, lambda: reference, measure=True)


def row(name: str) -> PriceRow:
    return next(one for one in priced()[1].rows if one.name == name)


# ---- the step


@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_steps_are_those_of_torchs_optimizer(max_norm):
    step = make_step(learning_rate=1e-3, max_norm=max_norm, settled=False)
    maker = StepMaker(step.step, trainable_parameters(step.model), max_norm)
    other = {name: -torch.einsum("n,n...->...", step.weights.roll(3), rows) for name, rows in step.columns.items()}
    for factor, keeps in ((1.0, True), (0.5, True), (1.0, False)):
        twin = make_step(learning_rate=1e-3, max_norm=max_norm, settled=False)
        if not keeps:
            for state in twin.optimizer.state.values():
                state["exp_avg"].zero_()
        wanted = take_next_step(twin.model, twin.optimizer, other, max_norm, factor * 1e-3).parameter_delta
        found = maker.delta(other, factor, keeps)
        assert all(torch.allclose(found[name], part, rtol=1e-9, atol=1e-15) for name, part in wanted.items())


# ---- the objectives, as trainers write them


def autograd_of(step: TinyStep, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = trainable_parameters(step.model)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def token_values(step: TinyStep) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiable (N, L) log pi and H, and the mask, straight from the logits."""
    batch, mask = step.train, step.train.completion_mask[:, 1:]
    logits = step.model(
        input_ids=batch.input_ids, attention_mask=(batch.completion_mask | batch.prompt_mask).long()
    ).logits
    logprobs = logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return chosen, -(logprobs.exp() * logprobs).sum(-1), mask


def gradient(step: TinyStep, one: Intervention) -> dict[str, torch.Tensor]:
    """Of the objective, which the step ascends."""
    assert one.objective is not None, one.reason
    if isinstance(one.objective, torch.Tensor):
        return {name: torch.einsum("n,n...->...", one.objective, rows) for name, rows in step.columns.items()}
    if isinstance(one.objective, Added):
        assert one.objective.coefficient is not None
        run = gradient(step, Intervention("", "", step.weights))
        added = batch_gradients(step.model, step.train, [one.objective.term.scaled(one.objective.coefficient)])[0]
        return {name: g + added[name] for name, g in run.items()}
    return batch_gradients(step.model, step.train, [one.objective])[0]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    length = dot(right, right) ** 0.5
    off = {name: left[name] - right[name] for name in left}
    assert dot(off, off) ** 0.5 < 1e-9 * length


def listed(tokens: TrainingTokens, reference: object = NO_REFERENCE) -> dict[str, Intervention]:
    return {one.name: one for one in interventions(tokens, reference)}  # type: ignore[arg-type]


def test_an_entropy_bonus_is_the_mean_token_entropy():
    step = tiny()
    logprob, entropy, mask = token_values(step)
    loss = (step.weights[:, None] * logprob * mask).sum() + 0.01 * entropy[mask].mean()
    assert_same(gradient(step, listed(training_tokens(step))["entropy_bonus_0.01"]), autograd_of(step, loss))


def test_kl_is_the_k3_estimate_of_trainers():
    step = tiny()
    logprob, _, mask = token_values(step)
    known = logprob.detach() + 0.3 * torch.rand(logprob.shape, generator=torch.Generator().manual_seed(1)).double()
    difference = known - logprob
    k3 = difference.exp() - difference - 1
    loss = (step.weights[:, None] * logprob * mask).sum() - 0.04 * k3[mask].mean()
    padded = torch.nn.functional.pad(known * mask, (1, 0))
    reference = TokenStatistics(padded, torch.zeros_like(padded))
    found = listed(training_tokens(step), lambda: reference)["kl_0.04"]
    assert_same(gradient(step, found), autograd_of(step, loss))


def test_tokens_are_chosen_as_named():
    step = tiny()
    tokens = training_tokens(step)
    mask, found = step.train.completion_mask, listed(training_tokens(step))
    entropy, logprob = tokens.statistics.entropies, tokens.statistics.logprobs
    kept = found["top_entropy"].objective.logprob != 0  # type: ignore[union-attr]
    assert int(kept.sum()) == round(0.2 * int(mask.sum()))
    assert float(entropy[kept].min()) >= float(entropy[mask & ~kept].max())
    left = mask & (found["clip_cov"].objective.logprob == 0)  # type: ignore[union-attr]
    advantage = tokens.advantages[:, None].expand(mask.shape)
    covariance = (logprob - logprob[mask].mean()) * (advantage - advantage[mask].mean())
    assert int(left.sum()) == round(0.02 * int(mask.sum()))
    assert float(covariance[left].min()) > float(covariance[mask & ~left].max())
    weights = found["decorrelated"].objective.logprob[mask]  # type: ignore[union-attr]
    own = (logprob + entropy)[mask]
    assert abs(float((weights * (own - own.mean())).sum())) < 1e-12
    steer = (found["steer"].objective.logprob / tokens.weights[:, None])[mask]  # type: ignore[union-attr]
    assert float(steer.min()) == pytest.approx(0.5) and float(steer.max()) <= 1.0
    weights = found["without_truncated"].objective
    assert torch.equal(weights, torch.where(tokens.truncated, 0.0, tokens.weights))  # type: ignore[arg-type]


def test_terms_are_differentiated_once(monkeypatch):
    """The three bonuses share the gradient of entropy, and all rules one forward pass."""
    calls = []

    def counted(model, batch, coefficients, *rest):
        calls.append(len(coefficients))
        return batch_gradients(model, batch, coefficients, *rest)

    monkeypatch.setattr(price_steps, "batch_gradients", counted)
    price_list(price_inputs(tiny()), NO_REFERENCE)
    assert calls == [TOKEN_GRADIENTS - 1], "without a reference there is no KL term"


def test_what_does_not_apply_says_why():
    step = tiny()
    tokens = training_tokens(
        step, rewards=torch.full((16,), torch.nan), truncated=torch.zeros(16, dtype=torch.bool), costliest=None
    )
    found = listed(tokens)
    assert found["grpo"].reason == "not all training sequences have rewards"
    assert found["without_truncated"].reason == "no completion was truncated"
    assert found["without_4"].reason and found["kl_0.04"].reason == NO_REFERENCE
    assert found["clip_higher"].reason == found["kl_cov"].reason == ON_POLICY
    negative = listed(training_tokens(step, weights=-step.weights.abs()))
    assert negative["positives_only"].objective is None and negative["negatives_only"].objective is not None


# ---- the prices


def test_predictions_are_products_with_both_gradients():
    inputs, _ = priced()
    step = tiny()
    r = inputs.rewards - inputs.rewards.mean()
    logprobs = token_statistics(step.model, step.evaluation).scores()
    assert len(logprobs) == len(r)
    of_reward = batch_gradients(step.model, step.evaluation, [score_coefficients(step.evaluation, r / (len(r) - 1))])[0]
    of_entropy = entropy_gradient(step.model, step.evaluation, "split")
    for name in ("negatives_only", "entropy_bonus_0.01", "momentum_reset", "steer", "grpo"):
        one = listed(inputs.tokens)[name]
        loss = {key: -part for key, part in gradient(step, one).items()}
        delta = inputs.steps.delta(loss, one.learning_rate_factor, one.keeps_momentum)
        found = row(name)
        assert found.entropy and found.reward
        assert found.entropy.value == pytest.approx(dot(of_entropy, delta), rel=1e-6)
        assert found.reward.value == pytest.approx(dot(of_reward, delta), rel=1e-6)


def test_the_reports_estimator_gives_its_own_numbers():
    step = tiny()
    result = price_list(price_inputs(step, estimator="rao_blackwell"), NO_REFERENCE)
    known = dot(step.gradient_of_h("rao_blackwell"), step.step.parameter_delta)
    found = result.rows[0].entropy
    assert found and found.value == pytest.approx(known, rel=1e-6)
    assert found.value != pytest.approx(row("run").entropy.value, rel=1e-3)  # type: ignore[union-attr]


def test_steps_pass_in_parts_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(
        price_steps, "_STEPS_HELD", 3 * 8 * sum(p.numel() for p in trainable_parameters(tiny().model).values())
    )
    inputs = price_inputs(tiny())
    apart, whole = price_list(inputs, NO_REFERENCE), priced()[1]
    for left in apart.rows:
        if left.entropy is not None:
            right = next(one for one in whole.rows if one.name == left.name)
            assert right.entropy and left.entropy.value == pytest.approx(right.entropy.value, rel=1e-9)


def test_errors_leave_a_prompt_out_of_everything():
    inputs, result = priced()
    one = listed(inputs.tokens)["negatives_only"]
    steps = {}
    for name in ("run", "negatives_only"):
        loss = {key: -part for key, part in gradient(tiny(), listed(inputs.tokens)[name]).items()}
        steps[name] = inputs.steps.delta(loss)
    kept_values = []
    batch = inputs.evaluation.batch
    for prompt in batch.prompt_index.unique():
        part = batch.select((batch.prompt_index != prompt).nonzero().flatten().tolist())
        g = entropy_gradient(tiny().model, part, "split")
        kept_values.append(dot(g, steps["negatives_only"]) - dot(g, steps["run"]))
    values = np.array(kept_values)
    error = np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum())
    assert one.objective is not None
    assert row("negatives_only").entropy_minus_run.standard_error == pytest.approx(error, rel=1e-6)  # type: ignore[union-attr]


def test_the_solved_bonus_holds_entropy():
    for seed in range(6):
        step = make_step(learning_rate=1e-3, settled=False, seed=seed)
        if dot(step.gradient_of_h(), step.step.parameter_delta) < 0:
            break
    rows = {one.name: one for one in price_list(price_inputs(step), NO_REFERENCE).rows}
    run, held = rows["run"].entropy, rows["entropy_bonus_that_holds"]
    assert run and run.value is not None and run.value < 0 and held.entropy, held.reason
    assert held.coefficient and held.coefficient > 0 and abs(held.entropy.value or 1.0) < 1e-4 * abs(run.value)


def test_a_bonus_that_clipping_stops_is_not_solved():
    assert "no coefficient up to 100 was found that does" in (row("entropy_bonus_that_holds").reason or "")


def test_small_real_steps_do_what_is_predicted():
    """The split estimator's products are the exact derivatives of both reweighted measurements."""
    result = price_list(price_inputs(make_step(learning_rate=1e-7, settled=False)), NO_REFERENCE, measure=True)
    changed = [
        one for one in result.rows if one.measured and one.entropy and one.entropy.value and "without" not in one.name
    ]
    assert len(changed) >= 12
    for one in changed:
        assert one.measured and one.entropy and one.reward
        assert one.measured.entropy == pytest.approx(one.entropy.value, rel=1e-2), one.name
        scale = 24 / 23  # the prediction divides by n - 1
        assert one.measured.reward == pytest.approx((one.reward.value or 0.0) / scale, rel=1e-2, abs=1e-9), one.name


def test_everything_is_as_before_and_the_record_is_whole():
    inputs, result = priced()
    with weights_moved(tiny().model, tiny().step.parameter_delta, 0.0):
        pass
    after = token_statistics(tiny().model, tiny().evaluation)
    assert torch.equal(after.logprobs, tiny().statistics.logprobs), "the model was moved"
    assert validated(PricesResult, json.loads(json.dumps(json_of(result))), "summary.json") == result
    assert len({one.name for one in result.rows}) == len(result.rows) and result.rows[0].name == "run"
    assert sum(one.reason != ON_POLICY for one in result.rows) == MOST_INTERVENTIONS
    assert result.judged_prompts == 12 and result.eval_prompts == 24


def test_another_step_than_the_analysed_one_is_refused():
    inputs = price_inputs(tiny())
    wrong = training_tokens(tiny(), weights=tiny().weights.roll(1))
    with pytest.raises(ValueError, match="the step as trained"):
        price_list(PriceInputs(**{**vars(inputs), "tokens": wrong}), NO_REFERENCE)


@pytest.mark.parametrize("rewards, note", [(torch.nan, "not all evaluation"), (1.0, "all equal")])
def test_without_rewards_entropy_alone_is_priced(rewards, note):
    step = make_step(learning_rate=1e-3, settled=False)
    result = price_list(price_inputs(step, torch.full((24,), rewards, dtype=torch.float64)), NO_REFERENCE)
    assert note in (result.reward_note or "") and not result.alike
    assert all(one.reward is None for one in result.rows)
    assert plot_prices(result) is not None and price_finding(result)


# ---- what is shown


def test_table_and_figure_hold_every_row():
    _, result = priced()
    table, measured = TABLES["prices"](result)
    assert [cells[0] for cells in table.rows] == [one.label for one in result.rows]
    assert [cells[0] for cells in measured.rows] == [one.label for one in result.rows if one.measured is not None]
    assert all(len(cells) == len(one.columns) for one in (table, measured) for cells in one.rows)
    points = price_points(result)
    assert len(points) >= 12 and png_bytes(plot_prices(result)).startswith(b"\x89PNG")
    one = next(p for p in points if p.label == "negative weights only")
    found = row("negatives_only")
    area = np.pi / 4 * one.ellipse[0] * one.ellipse[1]  # type: ignore[index]
    s, t, c = found.entropy_minus_run.standard_error, found.reward_minus_run.standard_error, found.covariance  # type: ignore[union-attr]
    reach = 2 * found.entropy_minus_run.degrees_of_freedom / (found.entropy_minus_run.degrees_of_freedom - 1)  # type: ignore[operator, union-attr]
    reach *= stats.f.ppf(0.95, 2, found.entropy_minus_run.degrees_of_freedom - 1)  # type: ignore[operator, union-attr]
    assert reach > stats.chi2.ppf(0.95, 2)
    assert area == pytest.approx(np.pi * np.sqrt(s**2 * t**2 - c**2) * reach)  # type: ignore[operator]


def test_large_rows_give_the_same_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are as large as the model steps are made one at a time, and looked at in forward mode."""
    inputs, wanted = priced()
    monkeypatch.setattr(row_products, "LARGE_ROW", 0)
    large = dataclasses.replace(inputs, rows=RecomputedRows(inputs.model, inputs.tokens.batch))
    monkeypatch.setattr(row_products, "stream_rows", None)
    found = price_list(
        large, lambda: TokenStatistics(inputs.tokens.statistics.logprobs - 0.1, inputs.tokens.statistics.entropies)
    )
    assert [one.name for one in found.rows if one.reason is None] == [
        one.name for one in wanted.rows if one.reason is None
    ]
    for one, other in zip(found.rows, wanted.rows, strict=True):
        for key in ("entropy", "reward"):
            a, b = getattr(one, key), getattr(other, key)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-12)
                assert a.standard_error == pytest.approx(b.standard_error, rel=1e-5, abs=1e-12)
