"""`compute_full: false` forms no row, and gives the numbers that rows give."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from entropy_core import row_stream
from entropy_core.directional import token_derivatives
from entropy_core.entropy import Estimator
from entropy_core.gradients import trainable_parameters
from entropy_core.kernel import compute_kernels
from entropy_core.passes.settings import DEFAULT_PASSES
from entropy_experiments.fisher_analyzer import FisherComputation, analyze_batches
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.statistics.estimand import POLICY, Estimand
from entropy_experiments.step import weighted_directions
from entropy_experiments.step.evaluation_products import EvaluationSide
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows
from entropy_experiments.step.real_steps import StepMeasurement
from entropy_experiments.step.settings import AnalysisSettings
from entropy_experiments.step.weighted_directions import products_with_weightings
from tests.entropy_experiments.analyses.tiny_step import make_step, sample_batch
from tests.oracle.model_cases import CASES

FULLY_TRAINED = ["llama_tied", "qwen2_biases", "gpt2_conv1d_tied", "llama_untied_lora"]


def setting(name: str) -> tuple[nn.Module, torch.optim.AdamW]:
    """A policy in float64, and an AdamW with decay that has taken one step."""
    model = next(case for case in CASES if case.name == name).make(torch.float64)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4, weight_decay=0.1)
    ids = torch.randint(
        0, 37, (8, 12), generator=torch.Generator().manual_seed(0)
    )  # every token and position has a moment
    torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    ).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def numbers(found: FisherComputation) -> dict[str, Tensor]:
    """Everything that is known of the step."""
    step = found.numbers.step
    assert step is not None
    predictions, shares = step.predictions, step.attribution
    out = {
        "contributions": predictions.contributions,
        "own changes": predictions.own_changes,
        "shares": shares.shares,
        "measurement shares": shares.measurement_shares,
        "effects": shares.effects,
    }
    every = {"per token": predictions.per_token, "per completion": predictions.per_completion}
    every |= {"plain": {"": {"": predictions.without_preconditioner}}}
    for unit, estimators in every.items():
        for estimator, parts in estimators.items():
            values = [
                (e.value, e.standard_error, *e.left_out.tolist()) for e in parts.values() if e.left_out is not None
            ]
            out[f"{unit}, {estimator}"] = torch.tensor(values, dtype=torch.float64)
    return out


@pytest.mark.long
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "given"])
@pytest.mark.parametrize("name", FULLY_TRAINED)
def test_the_numbers_are_those_of_the_rows(name: str, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = setting(name)
    generator = torch.Generator().manual_seed(1)
    evaluation, train = sample_batch(model, 5, 2, generator), sample_batch(model, 3, 2, generator)
    weights = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64) / 36

    def analyze(**more: object) -> FisherComputation:
        settings = AnalysisSettings(Estimand.of(drawn), max_grad_norm=1e-2, **more)
        return analyze_batches(model, optimizer, evaluation, train, weights, settings)

    expected = numbers(analyze(measure=False))

    def no_rows(*_: object) -> None:
        raise AssertionError("a row was formed")

    monkeypatch.setattr(row_stream.RowStream, "run", no_rows)
    found = analyze(compute_full=False)
    assert found.numbers.kernels is None and all(check.passed for check in found.numbers.checks)
    for what, values in numbers(found).items():
        # columns of a kernel, and so products of rows with the step, are kept in float32
        torch.testing.assert_close(values.double(), expected[what].double(), rtol=2e-5, atol=1e-9, msg=what)


def test_what_the_chosen_modules_leave_out_is_known_without_rows() -> None:
    model, optimizer = setting("llama_tied")
    generator = torch.Generator().manual_seed(1)
    batches = (sample_batch(model, 4, 2, generator), sample_batch(model, 3, 2, generator))
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64) / 36
    left_out = []
    for compute_full in (True, False):
        settings = AnalysisSettings(
            kernel=KernelOptions(modules=["*q_proj*", "*mlp*"]), compute_full=compute_full, measure=False
        )
        step = analyze_batches(model, optimizer, *batches, weights, settings).numbers.step
        assert step is not None
        left_out.append(step.predictions.left_out)
    assert left_out[0] == pytest.approx(left_out[1], rel=1e-5) and 0.01 < abs(left_out[0]) < 10


def test_response_shares_under_a_clip_survive_entries_without_gradient() -> None:
    """What no sequence has a gradient of has no derivative of sqrt(v); the clip once handed that on to every other entry."""
    world = make_step(max_norm=1e-3, settled=False)
    name = next(iter(world.columns))
    columns = {n: rows.clone() for n, rows in world.columns.items()}
    parameter = trainable_parameters(world.model)[name]
    columns[name].flatten(1)[:, 0] = 0.0
    for moment in ("exp_avg", "exp_avg_sq"):
        world.optimizer.state[parameter][moment].flatten()[0] = 0.0
    steps = StepMeasurement(
        world.model, world.optimizer, KeptRows(columns), world.evaluation, world.statistics, max_grad_norm=1e-3
    )
    gradient, members = world.gradient_of_h(), torch.ones(1, len(world.train), dtype=torch.float64)
    found = steps.response_shares(gradient, world.weights, members).shares
    assert steps.clip(world.weights) < 1.0

    def change(place: int, by: float) -> float:
        weights = world.weights.clone()
        weights[place] *= 1 + by
        return steps.first_order(gradient, weights)

    numerical = torch.tensor(
        [(change(i, 1e-4) - change(i, -1e-4)) / 2e-4 for i in range(len(world.train))], dtype=torch.float64
    )
    torch.testing.assert_close(found, numerical, rtol=1e-4, atol=1e-4 * float(numerical.abs().max()))
    assert not math.isclose(float(found.abs().max()), 0.0)


@pytest.mark.parametrize("estimator", ["split", "rao_blackwell"])
def test_other_weights_without_rows_are_those_of_kernels(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(learning_rate=1e-3, max_norm=0.01, settled=False)
    p = dict(step.step.step_preconditioner)
    side = EvaluationSide(step.evaluation, step.statistics, dataclasses.replace(POLICY, gradient=estimator))
    positive, rolled = step.weights.clamp(min=0), step.weights.roll(1)
    combined = [step.weights - positive, 0.3 * rolled - 2.0 * positive, torch.zeros_like(rolled)]
    weightings = [step.weights, positive, combined[0], rolled, *combined[1:]]
    rows, passed = RecomputedRows(step.model, step.train), list[int]()

    def counted(*arguments, **options):
        passed.append(1)
        return token_derivatives(*arguments, **options)

    monkeypatch.setattr(weighted_directions, "token_derivatives", counted)
    found = products_with_weightings(step.model, side, rows, weightings, p, DEFAULT_PASSES)
    kernels, columns = (
        compute_kernels(step.model, step.evaluation, step.train, p, estimator),
        torch.stack(weightings, 1),
    )
    flat = {name: part.flatten(1) for name, part in step.columns.items()}
    inner = columns.T @ sum(part * p[name].flatten() @ part.T for name, part in flat.items()) @ columns
    wanted = (kernels.entropy_fisher.double() @ columns, kernels.fisher.double() @ columns, inner.diag(), inner[0])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert len(passed) == 3, "what is a combination of others takes no pass"


def test_weights_of_nothing_are_a_basis_of_one() -> None:
    basis, combinations = weighted_directions.independent(torch.zeros(4, 2, dtype=torch.float64))
    assert len(basis) == 1 and combinations.shape == (1, 2) and bool(torch.isfinite(combinations).all())
