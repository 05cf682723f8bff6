"""The response of AdamW's step to an entropy bonus: real steps of torch's own optimizer, and roots of functions that bend."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from entropy_core.adamw import read_adamw_state
from entropy_core.bonus import BonusResponse, solve_bonus

DECAY, MAX_NORM = 0.1, 0.7


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _random(model: nn.Module, seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return {n: size * torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def _warmed(amsgrad: bool = False, steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    model = _model()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "lr": 1e-2}, {"params": vectors, "lr": 3e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), weight_decay=DECAY, amsgrad=amsgrad)
    for seed in range(steps):
        _step(model, optimizer, _random(model, seed, 2.0 - 0.5 * seed))
    return model, optimizer


def _step(model: nn.Module, optimizer: torch.optim.AdamW, gradient: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.grad = gradient[name].clone()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


def _taken(model, optimizer, gradient, q, steps=1) -> float:
    """<q, what torch's own steps with this gradient do>, of copies."""
    model, optimizer = copy.deepcopy((model, optimizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(steps):
        _step(model, optimizer, gradient)
    return sum(float((q[name] * (p.detach() - before[name])).sum()) for name, p in model.named_parameters())


def _response(model, optimizer, g, b, max_norm: float | None = MAX_NORM) -> BonusResponse:
    parameters = dict(model.named_parameters())
    return BonusResponse(read_adamw_state(optimizer, parameters), parameters, g, b, max_norm)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.4, 30.0])
def test_one_step_is_adamws_own(amsgrad: bool, alpha: float) -> None:
    """Clipping, both moments, P, groups and decay answer to the bonus as torch's optimizer does."""
    model, optimizer = _warmed(amsgrad)
    g, b, q = (_random(model, seed) for seed in (10, 11, 12))
    found = _response(model, optimizer, g, b).along(q, alpha)
    with_bonus = {name: g[name] - alpha * b[name] for name in g}
    assert found == pytest.approx(_taken(model, optimizer, with_bonus, q), rel=1e-10)


def test_the_first_step_too() -> None:
    model, optimizer = _warmed(steps=0)
    g, b, q = (_random(model, seed) for seed in (10, 11, 12))
    found = _response(model, optimizer, g, b).along(q, 0.3)
    assert found == pytest.approx(_taken(model, optimizer, {n: g[n] - 0.3 * b[n] for n in g}, q), rel=1e-6)


def test_without_clipping_nothing_is_clipped() -> None:
    model, optimizer = _warmed()
    g, b, q = (_random(model, seed, 0.01) for seed in (10, 11, 12))
    assert _response(model, optimizer, g, b, None).clip(50.0) == 1.0
    assert _response(model, optimizer, g, b).clip(0.0) == 1.0 > _response(model, optimizer, g, b).clip(50.0)


def test_several_steps_are_those_of_one_gradient_to_the_answer_of_p() -> None:
    """P is frozen over the horizon; with beta2 near 1 it stays, and so do the steps."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99999), weight_decay=0.0)
    for seed in range(200):
        _step(model, optimizer, _random(model, seed % 5))
    g, b, q = (_random(model, seed) for seed in (10, 11, 12))
    found = _response(model, optimizer, g, b).along(q, 0.3, steps=6)
    taken = _taken(model, optimizer, {n: g[n] - 0.3 * b[n] for n in g}, q, steps=6)
    one = _taken(model, optimizer, {n: g[n] - 0.3 * b[n] for n in g}, q)
    assert found == pytest.approx(taken, rel=0.02)
    assert abs(taken - 6 * one) > 0.2 * abs(taken), "the case does not tell momentum's tail from one step six times"


def test_a_parameter_without_gradient_does_not_move() -> None:
    model, optimizer = _warmed()
    g, b, q = (_random(model, seed) for seed in (10, 11, 12))
    name = next(iter(g))
    response = _response(model, optimizer, {**g, name: None}, b)
    assert response.along({n: torch.zeros_like(v) for n, v in q.items()} | {name: q[name]}, 0.3) == 0.0


@pytest.mark.parametrize("wanted", [2e-3, -2e-3, 2e-2])
def test_the_solved_bonus_makes_the_real_step_change_by_what_was_wanted(wanted: float) -> None:
    model, optimizer = _warmed()
    g, b = _random(model, 10), _random(model, 11)
    response = _response(model, optimizer, g, b)
    without = response.along(b, 0.0)
    found = solve_bonus(lambda a: response.along(b, a), without + wanted, -50.0, 50.0, 0.1)
    taken = _taken(model, optimizer, {n: g[n] - found.coefficient * b[n] for n in g}, b)
    assert not found.saturated and math.copysign(1, found.coefficient) == math.copysign(1, wanted)
    assert taken - without == pytest.approx(wanted, rel=2e-3), "linearised, or clipping left out?"


def test_clipping_and_p_bend_the_response_so_that_a_line_would_miss() -> None:
    """Else the test above would not tell the exact solution from a linearised one."""
    model, optimizer = _warmed()
    g, b = _random(model, 10), _random(model, 11)
    response, wanted = _response(model, optimizer, g, b), 2e-2
    start, slope = response.along(b, 0.0), (response.along(b, 1e-4) - response.along(b, 0.0)) / 1e-4
    line = wanted / slope
    assert abs(response.along(b, line) - start - wanted) > 0.02 * wanted


def test_what_is_out_of_reach_ends_at_the_bound_and_says_so() -> None:
    found = solve_bonus(lambda a: 0.1 * a, 1.0, 0.0, 2.0, 0.5)
    assert (found.coefficient, found.change, found.saturated) == (2.0, pytest.approx(0.2), True)
    none = solve_bonus(lambda a: 0.1 * a, -1.0, 0.0, 2.0, 0.5)
    assert (none.coefficient, none.saturated) == (0.0, True), "a bonus was turned into a penalty beyond the lower bound"


def test_a_response_that_turns_back_is_not_followed_over_its_top() -> None:
    found = solve_bonus(lambda a: a / (1 + a**2), 0.6, 0.0, 100.0, 0.1)
    assert found.saturated and 0.3 < found.change <= 0.5 and found.coefficient <= 3.0
    nothing = solve_bonus(lambda a: -a, 1.0, 0.0, 10.0, 0.1)
    assert (nothing.coefficient, nothing.saturated) == (0.0, True), "a bonus that lowers entropy was given"


@pytest.mark.parametrize("guess", [1e-6, 0.1, 40.0, -3.0, math.inf])
@pytest.mark.parametrize("wanted", [0.3, 0.9, -0.5])
def test_the_root_does_not_depend_on_the_guess(guess: float, wanted: float) -> None:
    found = solve_bonus(lambda a: math.tanh(0.2 * a) + 0.1, wanted, -50.0, 50.0, guess)
    assert not found.saturated
    assert found.coefficient == pytest.approx(math.atanh(wanted - 0.1) / 0.2, rel=0.01)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="leave out 0"):
        solve_bonus(lambda a: a, 1.0, 1.0, 2.0, 1.0)
    model, optimizer = _warmed()
    g = _random(model, 10)
    g[next(iter(g))][0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        _response(model, optimizer, g, {})


def test_the_loss_gradients_own_part_of_several_steps() -> None:
    """`of_gradient` times the weights is what is left of `along` without momentum and decay, over one step and over six."""
    model, optimizer = _warmed()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    g, q = _random(model, 10), _random(model, 12)
    response = _response(model, optimizer, g, {})
    for steps in (1, 6):
        in_all, own = response.weights(steps)
        assert response.along(q, 0.0, steps) == pytest.approx(in_all * response.of_gradient(q), rel=1e-12)
        assert (own == pytest.approx(in_all, rel=1e-12)) == (steps == 1)
    later = {n: torch.zeros_like(v) for n, v in g.items()}
    twin, moments = copy.deepcopy((model, optimizer))
    _step(twin, moments, g)
    before = dict(model.named_parameters())
    first = sum(float((q[n] * (p - before[n]).detach()).sum()) for n, p in twin.named_parameters())
    after = _response(twin, moments, later, {}).along(q, 0.0, 5)
    # P goes on by beta2 = 0.9 a step in the truth, which the horizon's frozen one leaves out.
    assert response.weights(6)[1] * response.of_gradient(q) == pytest.approx(first + after, rel=0.15)
