"""The effect of leaving a sequence out, against real AdamW steps without it, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from entropy_core.adamw import preconditioner, read_adamw_state
from entropy_core.leaving_out import leaving_out_direction

SEQUENCES, WIDTH = 12, 40


class Steps:
    """Two parameters under a real AdamW; gradients are -sum_i w_i rows_i of rows drawn anew at every step."""

    def __init__(self, steps: int, max_norm: float, seed: int = 0) -> None:
        self.generator, self.max_norm = torch.Generator().manual_seed(seed), max_norm
        self.parameters = {"a": torch.nn.Parameter(self.draw(WIDTH)), "b": torch.nn.Parameter(self.draw(3, 5))}
        self.optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=0.01, weight_decay=0.1, eps=1e-6)
        self.mean = {name: 0.5 * self.draw(*p.shape) for name, p in self.parameters.items()}
        for _ in range(steps):
            self.take(self.optimizer, self.parameters, *self.rows())
        self.entropy_gradient = {name: self.draw(*p.shape) for name, p in self.parameters.items()}

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
            p.grad = -c * torch.tensordot(weights, rows[name], 1)
        optimizer.step()
        return {n: p.detach() - before[n] for n, p in parameters.items()}

    def change(self, rows: dict[str, Tensor], weights: Tensor) -> float:
        """<grad h, step> of a real step on a copy of everything."""
        parameters = {n: torch.nn.Parameter(p.detach().clone()) for n, p in self.parameters.items()}
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.01, weight_decay=0.1, eps=1e-6)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        taken = self.take(optimizer, parameters, rows, weights)
        return sum(float((self.entropy_gradient[n] * d).sum()) for n, d in taken.items())


@pytest.mark.parametrize("max_norm", [1e9, 0.3], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("steps", [0, 3, 30])
def test_it_is_the_derivative_of_the_real_step_by_a_sequences_weight(steps: int, max_norm: float) -> None:
    """Relative to its weight: (change(w_i (1 + s)) - change(w_i (1 - s))) / 2s of two real steps."""
    world = Steps(steps, max_norm)
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


def test_names_must_be_the_same_everywhere() -> None:
    world = Steps(1, 1e9)
    state = read_adamw_state(world.optimizer, world.parameters)
    with pytest.raises(ValueError, match="different parameters"):
        leaving_out_direction(state, {"a": torch.ones(WIDTH)}, world.entropy_gradient)
