"""Rewards beyond float32 are refused, and what has no weight does not count as trained."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.premises.reward_range import check_rewards
from rl_training.run.rollouts import read_rollouts
from rl_training.train import build_trainer
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer
from tests.tiny_policy import tiny_train_config


def with_rewards(tiny_policy, folder, size: float, second: float | None = None, **sections: Any) -> DrGRPOTrainer:
    """A run whose completions earn + or - size, and from another function `second`."""
    config = tiny_train_config(
        tiny_policy, folder, training={"steps": 1, "save_every": 1}, entropy_probe={"enabled": False}, **sections
    )
    trainer, _ = build_trainer(config)

    def huge(completions: list, **_: Any) -> list[float]:
        return [size * (-1) ** n for n in range(len(completions))]

    trainer.reward_funcs[0], trainer.reward_func_names[0] = huge, "huge"
    if second is not None:
        trainer.reward_funcs.append(lambda completions, **_: [second] * len(completions))
        trainer.reward_func_names.append("second")
        trainer.reward_processing_classes.append(None)
        trainer.reward_weights = torch.ones(2)
    return trainer


@pytest.mark.parametrize("size", [1e308, 1e30, float("inf"), 1e16])
def test_rewards_that_float32_cannot_compute_with_are_one_line(tiny_policy, tmp_path, size):
    with pytest.raises(UserError, match=r"reward function 'huge' gave .*(inf|1e\+30|1e\+16).*scale or clip"):
        with_rewards(tiny_policy, tmp_path / "run", size).train()


def test_so_are_sums_and_weighted_rewards():
    two = torch.full((3, 2), 6e14)
    with pytest.raises(UserError, match="the weighted sum of rewards gave 1.2e.15"):
        check_rewards(two, ["a", "b"], torch.ones(2))
    with pytest.raises(UserError, match="'b' gave 6e.15"):
        check_rewards(two, ["a", "b"], torch.tensor([1.0, 10.0]))
    check_rewards(torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]]), ["a", "b"], torch.ones(2))


@pytest.mark.parametrize("size", [1e15, 1.0, 1e-6])
def test_rewards_within_it_are_trained_on(tiny_policy, tmp_path, size):
    """At the largest the gradient is still one that clipping makes a step of."""
    trainer = with_rewards(tiny_policy, tmp_path / "run", size)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer.train()
    rows = read_rollouts(tmp_path / "run", 1)
    assert all(row.weight == pytest.approx(row.reward / (16 * 8)) for row in rows)
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters()), "training stands still"


@pytest.mark.parametrize("size", [0.0, 1e-44], ids=["equal", "underflow"])
def test_sequences_without_weight_are_not_counted_as_trained_and_a_run_of_them_says_so(tiny_policy, tmp_path, size):
    """Nothing is rejected here, so that every group would pass for trained; weights of 1e-44 / 128 are 0 in float32."""
    trainer = with_rewards(tiny_policy, tmp_path / "run", size, training_buffer={"reject_zero_advantage": False})
    with pytest.warns(RuntimeWarning, match="nothing was trained: in 1 steps no sequence had weight"):
        trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "buffer/trained" in entry)
    assert logged["buffer/trained"] == 0 and logged["buffer/filler"] == 16 == logged["buffer/generated"]
    assert {row.status for row in read_rollouts(tmp_path / "run", 1)} == {"filler"}


def test_rewards_that_are_missing_are_not_called_equal(tiny_policy, tmp_path):
    trainer = with_rewards(
        tiny_policy, tmp_path / "run", float("nan"), training_buffer={"reject_zero_advantage": False}
    )
    with pytest.warns(RuntimeWarning, match=r"nothing was trained: .* or missing \(None or NaN\)"):
        trainer.train()


def test_one_function_among_several_is_named(tiny_policy, tmp_path):
    with pytest.raises(UserError, match="reward function 'second'"):
        with_rewards(tiny_policy, tmp_path / "run", 1.0, second=-1e38).train()


@pytest.mark.parametrize("size", [1e308, 1e39, 1e20, float("inf"), 1e16, 1.0])
def test_the_probe_says_once_that_a_trainer_of_trl_cannot_compute_with_them(tmp_path, size):
    """TRL makes advantages of 0 of them, and nothing else tells. 1e16 is still one that it can divide by its deviation."""

    class OfSize(GRPOTrainer):
        def _calculate_rewards(self, inputs: Any, *rest: Any) -> torch.Tensor:
            now = size * (1 + self.state.global_step)
            return torch.tensor([[now * (-1) ** n] for n in range(len(inputs))], dtype=torch.float64).float()

    trainer = make_trainer(llama(), tmp_path, OfSize, max_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = attach_entropy_probe(
            trainer, EntropyProbeConfig(on_error="raise", mode="simple", preset="accurate"), console=False
        )
        trainer.train()
    told = [str(w.message) for w in caught if "even_start_reward" in str(w.message)]
    assert len(told) == (size > 1e18) == all(change.total.value == 0 for change in callback.history)
    assert not told or "trains nothing" in told[0]
