"""What of a trainer's micro-batches becomes the probe's sequences."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from rl_training.generation.rollout_sequences import to_training_sequences
from rl_training.integrations.trl_rollouts import StepRollouts
from rl_training.run.rollouts import read_rollouts
from rl_training.sampling import SamplingConfig
from rl_training.train import build_trainer
from tests.oracle.comparison import assert_named_close
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.tiny_policy import tiny_train_config

LENGTHS = [[2, 4], [1, 3]]  # of the completions in two micro-batches; four tokens are allowed


def fake_trainer(loss_type: str = "dr_grpo", beta: float = 0.0) -> SimpleNamespace:
    args = SimpleNamespace(loss_type=loss_type, beta=beta, max_completion_length=4)
    calls: list[dict] = []

    def compute_loss(model: nn.Module, inputs: dict, *args: object, **kwargs: object) -> str:
        calls.append(inputs)
        return "the loss"

    accelerator = SimpleNamespace(num_processes=1)
    return SimpleNamespace(args=args, accelerator=accelerator, compute_loss=compute_loss, calls=calls)


def micro_batch(lengths: list[int], start: int = 0) -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right, as TRL lays them out."""
    rows, longest = len(lengths), 5
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {
        "prompt_ids": torch.tensor([[0, 0, 7], [0, 8, 9]])[:rows],
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]])[:rows],
        "completion_ids": (torch.arange(rows * longest).view(rows, longest) + 10 + start) * mask,
        "completion_mask": mask.long(),
        "advantages": torch.tensor([1.5, -0.5])[:rows],
    }


def pass_through(trainer: SimpleNamespace, rollouts: StepRollouts, micro_batches: list[dict]) -> tuple[list, list]:
    model = nn.Linear(1, 1).train()
    for inputs in micro_batches:
        assert trainer.compute_loss(model, inputs, num_items_in_batch=3) == "the loss"
    return rollouts.take()


def test_every_micro_batch_of_a_step_is_taken_once_and_passed_on() -> None:
    trainer = fake_trainer()
    order: list[str] = []
    rollouts = StepRollouts(trainer, lambda inputs: order.append(f"before {len(trainer.calls)}"))
    batches = [micro_batch(LENGTHS[0]), micro_batch(LENGTHS[1], 50)]
    generated, trained = pass_through(trainer, rollouts, batches)
    assert trainer.calls == batches and order == ["before 0", "before 1"], "each is announced before its forward pass"
    assert generated == trained, "nothing was rejected"
    assert [s.prompt_ids for s in trained] == [(7,), (8, 9)] * 2
    assert [s.completion_ids for s in trained] == [(10, 11), (15, 16, 17, 18), (60,), (65, 66, 67)]
    assert [s.advantage for s in trained] == [1.5, -0.5] * 2
    assert all(s.drawn_score is None and s.log_prior == 0.0 for s in trained)
    assert rollouts.take() == ([], []), "the step's sequences are handed over once"
    trainer.compute_loss(nn.Linear(1, 1).eval(), batches[0])
    assert rollouts.take() == ([], []), "evaluation is no step"
    trainer.compute_loss(nn.Linear(1, 1), batches[0])
    rollouts.clear()
    assert rollouts.take() == ([], [])


@pytest.mark.parametrize(
    ("loss_type", "divisors"),
    [
        ("dr_grpo", [2 * 4 * 2] * 4),  # sequences of a micro-batch, the longest allowed, micro-batches
        ("grpo", [2 * 2 * 2, 2 * 4 * 2, 2 * 1 * 2, 2 * 3 * 2]),
        ("bnpo", [6 * 2, 6 * 2, 4 * 2, 4 * 2]),
        ("dapo", [10] * 4),
    ],
)
def test_weights_of_the_linear_losses(loss_type: str, divisors: list[int]) -> None:
    trainer = fake_trainer(loss_type)
    _, trained = pass_through(trainer, StepRollouts(trainer), [micro_batch(n) for n in LENGTHS])
    assert [s.weight for s in trained] == pytest.approx([a / d for a, d in zip([1.5, -0.5] * 2, divisors, strict=True)])


@pytest.mark.parametrize(("loss_type", "beta"), [("cispo", 0.0), ("sapo", 0.0), ("dr_grpo", 0.04)])
def test_weights_of_other_losses_are_unknown(loss_type: str, beta: float) -> None:
    trainer = fake_trainer(loss_type, beta)
    _, trained = pass_through(trainer, StepRollouts(trainer), [micro_batch([2, 4])])
    assert all(math.isnan(s.weight) for s in trained)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo"])
def test_a_completion_that_the_trainer_masked_out_was_drawn_all_the_same(loss_type: str) -> None:
    """mask_truncated_completions empties the mask of completions that were cut: they have no weight, but are the policy's."""
    inputs = micro_batch([4, 4])
    inputs["completion_mask"][1] = 0
    trainer = fake_trainer(loss_type)
    generated, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert [s.completion_ids for s in generated] == [(10, 11, 12, 13), (15, 16, 17, 18)]
    assert trained[1].weight == 0.0
    wanted = {"dr_grpo": 2 * 4, "grpo": 2 * 4, "bnpo": 4, "dapo": 4}[loss_type]
    assert trained[0].weight == pytest.approx(1.5 / wanted), "masked tokens count in no divisor"


def test_scores_at_which_reused_completions_were_drawn() -> None:
    inputs = micro_batch([2, 4])
    inputs["old_per_token_logps"] = torch.full((2, 5), -0.5)
    trainer = fake_trainer()
    _, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert [s.drawn_score for s in trained] == [-1.0, -2.0], "a sum over the completion's own tokens"
    inputs["completion_mask"][1] = 0
    _, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert [s.drawn_score for s in trained] == [-1.0, None], (
        "the trainer's forward pass did not see a masked completion"
    )


def test_advantages_of_tokens_are_averaged_over_them() -> None:
    inputs = micro_batch([2, 4])
    inputs["advantages"] = torch.tensor([[1.0, 3.0, 9.0, 9.0, 9.0], [1.0, 1.0, 2.0, 4.0, 9.0]])
    trainer = fake_trainer()
    _, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert [s.advantage for s in trained] == [2.0, 2.0]


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo"])
def test_minus_the_weights_times_the_scores_is_the_trainers_own_gradient(tiny_policy, tmp_path, loss_type: str) -> None:
    """Of TRL's trainer, before clipping; with two generations' micro-batches a step and cut completions masked out."""
    trainer = make_trainer(
        tiny_policy, tmp_path, loss_type=loss_type, max_steps=1, max_grad_norm=1e9, gradient_accumulation_steps=2,
        mask_truncated_completions=True, max_completion_length=20,
    )  # fmt: skip
    rollouts, found = StepRollouts(trainer), {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
            sequences = rollouts.take()[1]
            sampling_config = SamplingConfig(1.0, 20, (1,), 0)
            training = to_training_sequences(sequences, sampling_config, torch.device("cpu"))
            assert training.weights is not None and len(sequences) == 32
            formula = torch.tensor([s.weight for s in sequences], dtype=torch.float64)
            masked = (training.weights == 0).all(1)
            assert 0 < int(masked.sum()) < 32 and bool((formula[masked] == 0).all())
            read = formula[:, None] * training.batch.completion_mask
            torch.testing.assert_close(training.weights, read, rtol=1e-5, atol=1e-9)
            objective = score_coefficients(training.batch, -formula)
            model = trainer.accelerator.unwrap_model(trainer.model)
            found["rebuilt"] = batch_gradients(model.eval(), training.batch, [objective])[0]
            found["real"] = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}

    trainer.add_callback(Look())
    trainer.train()
    assert_named_close(found["rebuilt"], found["real"], 1e-4, "a normaliser of the loss")


def test_a_trainer_that_rejects_groups_hands_over_what_it_drew_before(tiny_policy, tmp_path) -> None:
    """Of the first round alone: later rounds drew in place of rejected prompts."""
    config = tiny_train_config(
        tiny_policy,
        tmp_path / "run",
        task={"size": 8},
        rollouts={"prompts_per_step": 4, "completions_per_prompt": 2},
        training={"steps": 3, "save_every": 3},
        entropy_probe={"mode": "simple", "preset": "accurate", "rollouts": "current", "eval_sequences": 8},
    )
    trainer, _ = build_trainer(config)
    trainer.train()
    last = read_rollouts(tmp_path / "run", 3)
    first_round = [row for row in last if row.round == 0]
    assert {row.status for row in first_round} >= {"rejected"}, "nothing was rejected: the test is blind"
    found = trainer.unfiltered_rollouts
    assert found == first_round
    assert [s.log_prior for s in found] == pytest.approx([-math.log(row.draw_probability) for row in first_round])
    assert len({s.log_prior for s in found}) > 1, "prompts were drawn by difficulty"
    logged = [entry for entry in trainer.state.log_history if "entropy_probe/predicted" in entry]
    assert len(logged) == 3 and logged[2]["entropy_probe/weights_ess"] < 8, "uneven prompts are weighted"
