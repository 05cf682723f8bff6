"""The recorded runs, and the command that records them. Each is Dr. GRPO by the product's own trainer.

    small-<seed>       the small policy (small_policy.py), all weights trained, 100 steps: entropy collapses
    turning-<seed>     the same with a reward for surprisal from step 36 to 70: entropy falls, rises and falls again
    aged-<seed>, agedturning-<seed>   the same two with sequences of the pool watched for 16 steps, and no gradients recorded
    smollm2-<seed>     SmolLM2-135M with LoRA, the demo's task with up to three terms, 20 steps: entropy collapses

A run whose last step is there is left alone. SmolLM2's go on from their last checkpoint; the small policy's, minutes long, begin
anew.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.probe_replay.recorder import Recorder, RecordSettings
from benchmarks.probe_replay.small_policy import make_policy
from entropy_experiments.records.writer import describe_environment
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.train import build_trainer

ROOT = Path("runs/probe_replay")
CONFIG = Path(__file__).parents[2] / "rl_training" / "cfg" / "testconfig.yaml"
_RUN = "training.report_to=[]", "entropy_probe.enabled=false", "training_buffer.max_refill_rounds=0"
_SMALL = (
    *_RUN,
    "lora.enabled=false",
    "task.source=jsonl",
    "task.name=sums",
    "task.arguments={}",
    "task.system_prompt=null",
    "task.size=512",
    "task.heldout_size=768",
    "optimizer.learning_rate=5e-4",
    "optimizer.weight_decay=0.01",
    "optimizer.micro_batch_size=64",
    "rollouts.max_completion_length=24",
)


@dataclass(frozen=True)
class Run:
    """A run's configuration and what is recorded of it. bonus: (first step, last step, reward for a nat of surprisal)."""

    name: str
    overrides: tuple[str, ...]
    record: RecordSettings
    steps: int
    bonus: tuple[int, int, float] | None = None

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    def recorded(self) -> list[Path]:
        return sorted((self.folder / "steps").glob("step-*.npz"))

    @property
    def complete(self) -> bool:
        return len(self.recorded()) >= self.steps


def find_run(name: str) -> Run:
    """`small-0`, `turning-3`, `smollm2-1`, ...: the part before the dash says which kind, the number is the seed."""
    kind, _, seed = name.rpartition("-")
    common = (f"training.seed={40 + int(seed)}", f"training.output_dir={ROOT / name / 'run'}")
    if kind in ("small", "turning", "aged", "agedturning"):
        policy = ROOT / "small-policy"
        small = (*_SMALL, f"model.name={policy}", f"task.path={policy / 'problems.jsonl'}", *common)
        record = RecordSettings(held_out=768, lags=6, shares=True)
        if kind.startswith("aged"):
            record = RecordSettings(held_out=768, derivatives=False, folds=False, held_derivatives=False, pool_age=16)
        if not kind.endswith("turning"):
            return Run(name, small, record, 100)
        reward = "task.reward=benchmarks.probe_replay.runs:answer_and_surprisal"
        return Run(name, (*small, reward), record, 110, (36, 70, 0.25))
    if kind == "smollm2":
        smollm2 = (
            *_RUN,
            "optimizer.learning_rate=2e-4",
            "task.arguments.max_terms=3",
            "task.heldout_size=256",
            *common,
        )
        record = RecordSettings(
            held_out=256, redraw_every=4, derivatives=False, folds=False, held_derivatives=False, common_prefix=True
        )
        return Run(name, smollm2, record, 20)
    raise SystemExit(f"{name}: runs are called small-<seed>, turning-<seed> or smollm2-<seed>")


def record(name: str) -> None:
    """Record one run; see the module's docstring for what is done with one that is there."""
    run = find_run(name)
    if run.complete:
        print(f"{name}: {run.steps} steps are there")
        return
    resumable = name.startswith("smollm2")
    if not resumable:
        shutil.rmtree(run.folder, ignore_errors=True)
        make_policy(ROOT / "small-policy")
    save_every = 2 if resumable else 100_000
    overrides = [f"training.steps={run.steps}", f"training.save_every={save_every}", *run.overrides]
    trainer, task = build_trainer(load_config(TrainConfig, CONFIG, overrides))
    trainer.args.save_total_limit = 1
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "environment.json").write_text(json.dumps(describe_environment(), indent=1) + "\n")
    trainer.add_callback(Recorder(trainer, task.heldout, run.record, run.folder))
    trainer.add_callback(_Progress(run))
    if run.bonus is not None:
        _surprisal.begin(trainer, run.bonus)
    checkpoints = sorted((run.folder / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)


class _Progress(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % (10 if self._run.steps > 50 else 1) == 0:
            print(f"{self._run.name}: step {state.global_step}", flush=True)


class _Surprisal:
    """-log pi of completions under the policy that is trained: as a reward it is an entropy bonus."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._bonus = (0, 0, 0.0)

    def begin(self, trainer: Any, bonus: tuple[int, int, float]) -> None:
        self._trainer, self._bonus = trainer, bonus

    def reward(self, prompts: list[Any], completion_ids: list[list[int]]) -> list[float]:
        first, last, scale = self._bonus
        if self._trainer is None or not first <= self._trainer.state.global_step + 1 <= last:
            return [0.0] * len(prompts)
        coder, rewards = self._trainer.processing_class, []
        for prompt, completion in zip(prompts, completion_ids, strict=True):
            text = coder.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            start = coder(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = self._trainer.model(input_ids=torch.tensor([start + completion])).logits[
                    0, len(start) - 1 : -1
                ]
            picked = torch.log_softmax(logits.double(), -1)[torch.arange(len(completion)), torch.tensor(completion)]
            rewards.append(-scale * float(picked.sum()))
        return rewards


_surprisal = _Surprisal()


def answer_and_surprisal(
    prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_columns: Any
) -> list[float]:
    """1 for the right last number, and in the bonus's steps so much a nat of surprisal."""
    from rl_training.tasks.rewards import last_number

    right = last_number(prompts=prompts, completions=completions, answer=answer)
    return [a + b for a, b in zip(right, _surprisal.reward(prompts, completion_ids), strict=True)]
