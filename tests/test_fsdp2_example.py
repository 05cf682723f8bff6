"""The hand-written FSDP2 loop: two processes that hold halves of every weight watch what one with all of them watches."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.tiny_policy import save_tiny_policy
from tests.two_processes import in_two_processes

STEPS, RATE = 2, 3e-3


def example():
    path = Path(__file__).parents[1] / "examples" / "fsdp2_loop_with_watch.py"
    spec = importlib.util.spec_from_file_location("fsdp2_loop_with_watch", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def policy() -> str:
    """Made by the first process."""
    made = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        made = [str(save_tiny_policy(Path(tempfile.mkdtemp()) / "policy"))]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    return made[0]


def changes(found) -> list[tuple[float, float, float]]:
    return [(c.change.value, c.change.standard_error, c.entropy) for c in found]


def watched() -> list:
    return changes(example().train(policy(), STEPS, RATE))


@pytest.mark.long
def test_halves_of_the_weights_watch_what_the_whole_does(capsys) -> None:
    whole = changes(example().train(policy(), STEPS, RATE))
    first, second = in_two_processes(watched)
    assert first == second, "every process has the whole batch's numbers"
    for one, two in zip(whole, first, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert abs(whole[0][0]) > 1e-3
    assert "changed by" in capsys.readouterr().out
