"""`record_steps` in two gloo processes of TRL, each with all the weights (DDP) or half of them (accelerate's FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

from entropy_experiments.buffers.dumps.read import import_rollouts
from entropy_experiments.console.import_source import ROLLOUTS_FILE, import_run
from rl_training.integrations.step_recorder import record_steps
from rl_training.run.step_record import FOLDER, GENERATED, LOSS, read_step, step_path
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.tiny_policy import save_tiny_policy
from tests.two_processes import in_two_processes

RUN = "RECORDED_RUN"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def train() -> list[list[dict[str, Any]]]:
    """Called in each process: what its own trainer had in the loss of each step, by micro-batch."""
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    if "ACCELERATE_USE_FSDP" in os.environ:
        _fsdp_on_a_cpu()
    folder = Path(os.environ[RUN])
    trainer = make_trainer(
        folder / "policy", folder / "run", max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=3, logging_steps=1, log_completions=True,
    )  # fmt: skip
    had: list[list[dict[str, Any]]] = []
    generate, loss = trainer._generate_and_score_completions, trainer.compute_loss

    def generating(inputs):
        had.append([])
        return generate(inputs)

    def computing(model, inputs, *args, **kwargs):
        had[-1].append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return loss(model, inputs, *args, **kwargs)

    trainer._generate_and_score_completions, trainer.compute_loss = generating, computing
    record_steps(trainer)
    trainer.train()
    assert trainer.model is not None
    weights = next(trainer.model.parameters())
    assert hasattr(weights, "placements") == ("ACCELERATE_USE_FSDP" in os.environ), type(weights)
    return had


def _fsdp_on_a_cpu() -> None:
    """accelerate turns several processes into FSDP for every kind of device but CPUs, where its FSDP runs as well."""
    start = AcceleratorState.__init__

    def starting(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = starting


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_one_record_holds_what_both_trained_on(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_policy(tmp_path / "policy")
    for name, value in {RUN: str(tmp_path), **(FSDP2 if way == "FSDP2" else {})}.items():
        monkeypatch.setenv(name, value)
    had = in_two_processes(train)
    run = tmp_path / "run"
    steps = [step_path(run, step) for step in (1, 2)]
    assert sorted((run / FOLDER).iterdir()) == sorted([*steps, run / FOLDER / "run.json", run / FOLDER / "SHA256SUMS"])
    for step in (1, 2):
        rows = read_step(run, step) or []
        trained = [
            (rank, number, *sequence)
            for rank in (0, 1)
            for number, b in enumerate(had[rank][step - 1])
            for sequence in of(b)
        ]
        names = ("rank", "batch", "prompt_ids", "completion_ids")
        in_loss = [tuple(row[n] for n in names) for row in rows if row["part"] == LOSS]
        assert len(trained) == 12 and in_loss == [sequence[:4] for sequence in trained]
        kept = [round(row["advantage"], 3) for row in rows if row["part"] == LOSS]
        assert kept == [sequence[4] for sequence in trained]
        generated = [row for row in rows if row["part"] == GENERATED]
        rewards = torch.tensor([row["rewards"][0] for row in generated]).view(-1, 4)
        scaled = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()
        assert all(all(row["mask"]) for row in rows) and any(scaled), "no group differs: the test is blind"
        found = [
            (r["rank"], r["prompt_ids"], r["completion_ids"], round(a, 3))
            for r, a in zip(generated, scaled, strict=True)
        ]
        wanted = [(rank, prompt, completion, advantage) for rank, _, prompt, completion, advantage in trained]
        assert sorted(found) == sorted(wanted), "groups of four over two times six: one is of both processes"

    made = import_run(run, tmp_path / "imported", str(tmp_path / "policy"), run / FOLDER)
    table = import_rollouts(made[0].folder / ROLLOUTS_FILE)
    known = [row for row in read_step(run, 2) or [] if row["part"] == GENERATED]
    beside = [(r.prompt_ids, r.completion_ids, r.reward) for r in table.rows]
    assert made[0].moments and beside == [(r["prompt_ids"], r["completion_ids"], r["rewards"][0]) for r in known]


def of(batch: dict[str, torch.Tensor]) -> Iterator[tuple[list[int], list[int], float]]:
    """Prompt, completion and advantage of each sequence of a micro-batch, without padding."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
    for prompt, asked, completion, drawn, advantage in zip(*(batch[name] for name in names), strict=True):
        yield prompt[asked.bool()].tolist(), completion[drawn.bool()].tolist(), round(float(advantage), 3)
