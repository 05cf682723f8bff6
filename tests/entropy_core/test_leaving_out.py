"""The effect of leaving a sequence out, against real AdamW steps without it, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from entropy_core.adamw import preconditioner, read_adamw_state
from entropy_core.leaving_out import clip_response, leaving_out_direction

SEQUENCES, WIDTH = 12, 40


class Steps:
    """Two parameters under a real AdamW; gradients are -sum_i w_i rows_i of rows drawn anew at every step."""

    def __init__(self, steps: int, max_norm: float, seed: int = 0, apart: bool = False, **settings) -> None:
        self.generator, self.max_norm, self.apart = torch.Generator().manual_seed(seed), max_norm, apart
        self.settings = {"weight_decay": 0.1, "eps": 1e-6, **settings}
        self.parameters = {"a": torch.nn.Parameter(self.draw(WIDTH)), "b": torch.nn.Parameter(self.draw(3, 5))}
        self.optimizer = self.adamw(self.parameters)
        self.mean = {name: 0.5 * self.draw(*p.shape) for name, p in self.parameters.items()}
        for _ in range(steps):
            self.take(self.optimizer, self.parameters, *self.rows())
        self.entropy_gradient = {name: self.draw(*p.shape) for name, p in self.parameters.items()}

    def adamw(self, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
        """One group, or, `apart`, one of its own rate, betas and decay for each parameter."""
        groups = [{"params": [p], "lr": 0.01} for p in parameters.values()]
        if self.apart:
            groups[1] |= {"lr": 0.03, "betas": (0.7, 0.95), "weight_decay": 0.0, "eps": 1e-3}
        return torch.optim.AdamW(groups, **self.settings)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def rows(self) -> tuple[dict[str, Tensor], Tensor]:
        rows = {name: self.mean[name] + self.draw(SEQUENCES, *p.shape) for name, p in self.parameters.items()}
        return rows, self.draw(SEQUENCES) / SEQUENCES

    def clip(self, rows: dict[str, Tensor], weights: Tensor) -> float:
        norm = torch.stack([torch.tensordot(weights, r, 1).norm() for r in rows.values()]).norm()
        return min(1.0, self.max_norm / float(norm))

    def take(self, optimizer, parameters, rows, weights) -> dict[str, Tensor]:
        """A real step with these rows and weights; returns theta_after - theta_before."""
        before, c = {n: p.detach().clone() for n, p in parameters.items()}, self.clip(rows, weights)
        for name, p in parameters.items():
            for row, weight in zip(rows[name], weights, strict=True):  # accumulated, as micro-batches are
                p.grad = -c * weight * row if p.grad is None else p.grad - c * weight * row
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {n: p.detach() - before[n] for n, p in parameters.items()}

    def change(self, rows: dict[str, Tensor], weights: Tensor) -> float:
        """<grad h, step> of a real step on a copy of everything."""
        parameters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in self.parameters.items()}
        optimizer = self.adamw(parameters)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        taken = self.take(optimizer, parameters, rows, weights)
        return sum(float((self.entropy_gradient[n] * d).sum()) for n, d in taken.items())


@pytest.mark.parametrize("max_norm", [1e9, 0.3], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("apart", [False, True], ids=["one group", "own groups"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adamw", "amsgrad"])
@pytest.mark.parametrize("steps", [0, 3, 30])
def test_it_is_the_derivative_of_the_real_step_by_a_sequences_weight(
    steps: int, amsgrad: bool, apart: bool, max_norm: float
) -> None:
    """Relative to its weight: (change(w_i (1 + s)) - change(w_i (1 - s))) / 2s of two real steps."""
    world = Steps(steps, max_norm, apart=apart, amsgrad=amsgrad)
    rows, weights = world.rows()
    clip = world.clip(rows, weights)
    assert (clip < 1) == (max_norm < 1), "the step of this test is clipped or not as it says"
    gradient = {n: -torch.tensordot(weights, r, 1) for n, r in rows.items()}
    state = read_adamw_state(world.optimizer, world.parameters)
    direction = leaving_out_direction(state, gradient, world.entropy_gradient, clip)
    effects = clip * weights * sum((rows[n].flatten(1) @ d.flatten() for n, d in direction.items()), torch.zeros(()))
    for i in range(SEQUENCES):
        s, sides = 1e-5, []
        for sign in (1, -1):
            moved = weights.clone()
            moved[i] *= 1 + sign * s
            sides.append(world.change(rows, moved))
        assert float(effects[i]) == pytest.approx((sides[0] - sides[1]) / (2 * s), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("steps", "most"), [(3, 0.85), (7, 1.0)])
def test_real_steps_without_a_sequence_follow_the_effect_and_not_the_share(steps: int, most: float) -> None:
    """Slope of the real difference on the effect near 1 early in training, where that on the accounting share is not."""
    real, effects, shares = [], [], []
    for seed in range(6):
        world = Steps(steps, 1e9, seed)
        rows, weights = world.rows()
        gradient = {n: -torch.tensordot(weights, r, 1) for n, r in rows.items()}
        state = read_adamw_state(world.optimizer, world.parameters)
        direction = leaving_out_direction(state, gradient, world.entropy_gradient)
        effects += (weights * sum(rows[n].flatten(1) @ d.flatten() for n, d in direction.items())).tolist()
        whole = world.change(rows, weights)
        for i in range(SEQUENCES):
            without = weights.clone()
            without[i] = 0
            real.append(whole - world.change(rows, without))
        world.take(world.optimizer, world.parameters, rows, weights)
        after = read_adamw_state(world.optimizer, world.parameters)
        t = steps + 1
        held = {n: 0.01 * 0.1 / (1 - 0.9**t) * preconditioner(s) * world.entropy_gradient[n] for n, s in after.items()}
        shares += (weights * sum(rows[n].flatten(1) @ d.flatten() for n, d in held.items())).tolist()
    x, y, z = (torch.tensor(v) for v in (effects, real, shares))
    slope, of_share = (float((v @ y) / (v @ v)) for v in (x, z))
    assert 0.85 <= slope <= 1.2, f"effect: slope {slope:.2f}"
    assert abs(slope - 1) < abs(of_share - 1) and of_share < most, f"share: slope {of_share:.2f}"


@pytest.mark.parametrize("max_norm", [1e9, 0.3], ids=["not clipped", "clipped"])
def test_effects_of_the_sequences_of_a_prompt_add_up_to_the_prompts(max_norm: float) -> None:
    """As a derivative exactly; of real steps without 3 of 12 sequences at once (momentum and P re-derived) near 1."""
    real, sums = [], []
    for seed in range(6):
        world = Steps(5, max_norm, seed)
        rows, weights = world.rows()
        clip = world.clip(rows, weights)
        gradient = {n: -torch.tensordot(weights, r, 1) for n, r in rows.items()}
        state = read_adamw_state(world.optimizer, world.parameters)
        direction = leaving_out_direction(state, gradient, world.entropy_gradient, clip)
        effects = (
            clip * weights * sum((rows[n].flatten(1) @ d.flatten() for n, d in direction.items()), torch.zeros(()))
        )
        for prompt in torch.arange(SEQUENCES).split(3):
            changes = []
            for left in (0.0, 1 - 1e-5, 1 + 1e-5):
                moved = weights.clone()
                moved[prompt] *= left
                changes.append(world.change(rows, moved))
            effect = float(effects[prompt].sum())
            assert effect == pytest.approx((changes[2] - changes[1]) / 2e-5, rel=1e-5, abs=1e-8)
            real.append(world.change(rows, weights) - changes[0])
            sums.append(effect)
    x, y = torch.tensor(sums), torch.tensor(real)
    assert 0.8 <= float((x @ y) / (x @ x)) <= 1.3


def test_a_clip_coefficient_of_torchs_own_moves_with_its_epsilon() -> None:
    """clip_grad_norm_ divides by |g| + 1e-6: with a gradient as small as that the norm's derivative is another."""
    generator = torch.Generator().manual_seed(3)
    g, change = (torch.randn(7, generator=generator, dtype=torch.float64) * 1e-6 for _ in range(2))

    def clipped(at: Tensor) -> tuple[Tensor, float]:
        p = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
        p.grad = at.clone()
        norm = float(torch.nn.utils.clip_grad_norm_([p], 1e-6))
        return p.grad, 1e-6 / (norm + 1e-6)

    own, c = clipped(g)
    assert c < 1
    difference = (clipped(g + 1e-6 * change)[0] - clipped(g - 1e-6 * change)[0]) / 2e-6
    k = clip_response(float(own.norm()), c)
    assert torch.allclose(difference, c * (change - k * own * (own @ change)), rtol=1e-6, atol=1e-18)


def test_names_must_be_the_same_everywhere() -> None:
    world = Steps(1, 1e9)
    state = read_adamw_state(world.optimizer, world.parameters)
    with pytest.raises(ValueError, match="different parameters"):
        leaving_out_direction(state, {"a": torch.ones(WIDTH)}, world.entropy_gradient)
