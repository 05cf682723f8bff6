"""Parameter groups with rates of their own, against the rates that torch's schedule set before each step."""

import pytest
import torch

from entropy_experiments.checkpoints.learning_rates import rates_after, rates_of_last_step
from rl_training.errors import UserError

STEPS = 3


def run(base, schedule):
    """(rates by group of each step, saved groups, saved schedule, log rows of the first group's rate)."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in base]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": rate} for w, rate in zip(weights, base, strict=True)], lr=1.0)
    scheduler, used = schedule(optimizer), []
    for _ in range(STEPS):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    rows = [{"step": step + 1, "learning_rate": rates[0]} for step, rates in enumerate(used)]
    return used, optimizer.state_dict()["param_groups"], scheduler.state_dict(), rows


def test_one_schedule_for_all_keeps_their_ratio():
    used, groups, state, rows = run((1e-3, 2e-5), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.7**k))
    assert rates_of_last_step(STEPS, rows, groups, state, 10) == pytest.approx(used[-1], rel=1e-9)
    assert rates_after(groups, used[-1][0], state) == pytest.approx(used[-1], rel=1e-9)


@pytest.mark.parametrize(
    ("base", "schedule"),
    [
        ((1e-3, 1e-3), lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda _: 1.0, lambda k: 0.5**k])),
        ((1e-3, 1e-5), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-6)),
    ],
    ids=["a function each", "one lowest rate for both"],
)
def test_schedules_of_their_own_are_refused_and_the_saved_rates_are_the_next_steps(base, schedule):
    used, groups, state, rows = run(base, schedule)
    saved = [group["lr"] for group in groups]
    assert used[-1][1] != pytest.approx(used[-1][0] * base[1] / base[0], rel=1e-3), "the ratio would do"
    with pytest.raises(UserError, match=f"schedules of their own.*checkpoint.learning_rate={saved[0]!r} analyses"):
        rates_of_last_step(STEPS, rows, groups, state, 10)
    with pytest.raises(UserError, match="how they relate where the first has 0.0007 is not recorded"):
        rates_after(groups, 7e-4, state)
    assert rates_after(groups, saved[0], state) == saved


def test_a_first_group_that_has_stopped():
    _, groups, state, rows = run(
        (1e-3, 1e-3), lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda k: max(0.0, 1 - k / STEPS), lambda _: 1.0])
    )
    with pytest.raises(UserError, match="analyse a checkpoint at which the first group has a rate above 0"):
        rates_of_last_step(STEPS, rows, groups, state, STEPS)
