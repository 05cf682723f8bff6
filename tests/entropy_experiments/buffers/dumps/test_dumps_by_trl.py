"""What GRPOTrainer itself writes under log_completions, held against the token ids that it generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy

import tests.tiny_policy as tiny_policy
from entropy_experiments.buffers.custom import PromptNumbers
from entropy_experiments.buffers.dumps.read import import_rollouts
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.double_sampling import custom_training
from rl_training.errors import UserError
from rl_training.integrations.step_recorder import record_steps
from rl_training.run.step_record import GENERATED, read_step
from tests.entropy_experiments.buffers.dumps.conftest import chat_tokenizer
from tests.entropy_experiments.buffers.dumps.files_of_trainers import lines
from tests.entropy_experiments.small_analysis import config
from tests.rl_training.integrations.test_trl_integration import make_trainer

SAMPLING = "entropy_analysis.sampling"
LONGEST = 8
EOS = 1


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_policy, "character_tokenizer", chat_tokenizer)
        return tiny_policy.save_tiny_policy(tmp_path_factory.mktemp("trl") / "policy")


def trained(policy: Path, run: Path, evaluated: bool = False, **settings: Any) -> Path:
    """A run of three steps on chat prompts; it records its token ids beside TRL's own dump."""
    given = {"log_completions": True, "max_completion_length": LONGEST, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(policy, run, **{**given, "learning_rate": 1e-3, **settings})
    chats = [{"prompt": [{"role": "user", "content": f"{a} + {b} ="}]} for a in range(8) for b in range(6)]
    trainer.train_dataset = Dataset.from_list(chats)
    if evaluated:
        trainer.eval_dataset = trainer.train_dataset.select(range(16))
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 2
    record_steps(trainer)
    trainer.train()
    return run


@pytest.fixture(scope="module")
def run(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(policy, tmp_path_factory.mktemp("trl") / "run")


def generated(run: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_step(run, step) or [] if row["part"] == GENERATED]


def told(train: Path, step: int, *more: str):
    return config(
        f"{SAMPLING}.train_sequences_path={train}", f"{SAMPLING}.train_sequences_step={step}", f"{SAMPLING}.temperature=1.0",
        f"{SAMPLING}.max_completion_length={LONGEST}", "entropy_analysis.eval_batch_size=4", "checkpoint.learning_rate=1e-3",
        "checkpoint.task={name: chain_sum, arguments: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}, size: 24, "
        "heldout_size: 16}", *more,
    )  # fmt: skip


def training_side(checkpoint: Checkpoint, settings):
    plan = plan_sampling(checkpoint, settings)
    return custom_training(checkpoint, plan, settings, PromptNumbers([*plan.task.train, *plan.task.heldout]))


@pytest.mark.filterwarnings("ignore")
def test_tokens_advantages_and_weights_are_those_of_the_run(policy: Path, run: Path, tmp_path: Path) -> None:
    table = import_rollouts(run / "completions", 2)
    known = generated(run, 2)
    assert table.format == "TRL" and len(table) == len(known) == 16
    rewards = torch.tensor([row["rewards"][0] for row in known], dtype=torch.float64).reshape(-1, 4)
    scaled = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert rewards.std(1).max() > 0, "no group differs: the test is blind"
    torch.testing.assert_close(torch.tensor([r.advantage for r in table.rows]), scaled.flatten().float())
    assert [r.reward for r in table.rows] == [row["rewards"][0] for row in known]

    checkpoint = load_checkpoint(run / "checkpoint-1", device="cpu", learning_rate=1e-3)
    training = training_side(checkpoint, told(run / "completions", 2))
    assert training.rollouts.prompt_ids == [row["prompt_ids"] for row in known]
    same = [a == b["completion_ids"] for a, b in zip(training.rollouts.completion_ids, known, strict=True)]
    special = [any(t in (0, 2, EOS, 98, 99) for t in row["completion_ids"][:-1]) for row in known]
    cut_short = [row["completion_ids"][-1] != EOS and len(row["completion_ids"]) < LONGEST for row in known]
    assert all(s or odd or cut for s, odd, cut in zip(same, special, cut_short, strict=True)) and sum(same) >= 8
    torch.testing.assert_close(training.weights, training.advantages / (16 * LONGEST))
    said = "; ".join(training.notes)
    assert "tokenised anew" in said and "recorded advantages over N L" in said and "several steps" not in said

    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"], "advantage": of.advantage, "step": 2}
        for row, of in zip(known, table.rows, strict=True)
    ]
    exact = training_side(checkpoint, told(lines(tmp_path / "ids.jsonl", rows), 2))
    assert exact.rollouts.prompt_ids == training.rollouts.prompt_ids
    assert torch.equal(exact.weights, training.weights)


def test_the_record_beside_it_gives_the_ids_themselves(run: Path) -> None:
    """`record_steps` of this project: token ids, rewards by weight, groups and temperature of the same steps."""
    table, known, texts = (
        import_rollouts(run / "recorded_steps", 2),
        generated(run, 2),
        import_rollouts(run / "completions", 2),
    )
    assert table.format == "TRL, recorded by this project" and table.steps == [2] and table.notes == ()
    assert [r.prompt_ids for r in table.rows] == [row["prompt_ids"] for row in known]
    assert [r.completion_ids for r in table.rows] == [row["completion_ids"] for row in known]
    assert [r.reward for r in table.rows] == [r.reward for r in texts.rows]
    logged = [r.advantage for r in texts.rows]
    assert len(set(logged)) > 2 and [r.advantage for r in table.rows] == pytest.approx(logged, abs=1e-6), (
        "the loss's own A_i"
    )
    assert {r.temperature for r in table.rows} == {1.0} and all(r.completion_mask is None for r in table.rows)
    groups = [r.group for r in table.rows]
    assert groups == [f"0.{k // 4}" for k in range(16)]
    assert import_rollouts(run, 2).format == table.format, "of both the ids are taken"


def test_a_generation_batch_of_several_steps_is_told(policy: Path, tmp_path: Path) -> None:
    run = trained(policy, tmp_path / "run", steps_per_generation=2, save_strategy="no")
    assert len(import_rollouts(run / "completions", 1)) == len(import_rollouts(run / "completions", 2)) == 32
    assert not any("generation batch" in note for note in import_rollouts(run / "completions", 1).notes)
    note = next(n for n in import_rollouts(run / "completions", 2).notes if "generation batch" in n)
    assert note.startswith("completions_00002.parquet has the sequences of completions_00001.parquet")
    record = import_rollouts(run / "recorded_steps", 1)
    assert all(row.advantage is None for row in record.rows), "of half of them nothing is known: rewards are taken"
    assert len(record) == 32 and "loss had 16 sequences and 32 were generated in it, 16 of them" in record.notes[0]
    with pytest.raises(UserError, match="holds no sequences of step 2"):
        import_rollouts(run / "recorded_steps", 2)


def test_an_evaluation_that_took_a_steps_place_is_refused(policy: Path, tmp_path: Path) -> None:
    run = trained(policy, tmp_path / "run", evaluated=True, per_device_eval_batch_size=16)
    assert len(import_rollouts(run / "completions", 1)) == 16
    with pytest.raises(UserError, match=r"completions_00002.parquet is of an evaluation at step 2 \(checkpoint-[23]/"):
        import_rollouts(run / "completions", 2)
