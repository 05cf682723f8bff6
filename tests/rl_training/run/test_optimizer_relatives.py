"""What schedules leave in an optimizer's groups: rates are of no account, betas that move are named."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from rl_training.run.optimizer_relatives import name_by_keys

SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8, cycle_momentum=False),
    "one cycle with betas": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False),
    "cyclic with betas": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=True),
    "averaged weights": lambda o: swa_utils.SWALR(o, 1e-2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    schedule = SCHEDULES[name](optimizer)
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    state = optimizer.state_dict()
    found = name_by_keys(state["state"], state["param_groups"])
    if "betas" in name:
        assert state["param_groups"][0]["betas"] != (0.9, 0.999), "the betas did not move: the test is void"
        assert found is not None and "cycle_momentum=False" in found
    else:
        assert found is None
