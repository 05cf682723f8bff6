"""The controller on a real model: SmolLM2-135M with LoRA on the demo's task, one seed, 30 steps of 32 sequences.

    dr_grpo      entropy falls as it will
    adaptive     use_adaptive_entropy, told the target
    controller   attach_entropy_controller, told the same target

    python -m benchmarks.study smollm2        half an hour on two cores; arms that are there are not made again

Every five steps entropy is measured on fresh completions of 128 held-out prompts. One seed shows a direction, not its size.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.study.measure import HeldOut
from benchmarks.study.runs import Looks
from benchmarks.study.tasks import ROOT
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.controller_config import EntropyControllerConfig
from rl_training.files import write_whole
from rl_training.integrations.entropy_controller import attach_entropy_controller
from rl_training.models.load import add_lora, load_model_and_tokenizer
from rl_training.tasks.task import load_task

CONFIG = Path(__file__).parents[2] / "rl_training" / "cfg" / "testconfig.yaml"
RESULTS = Path(__file__).parents[1] / "results" / "study" / "smollm2.json"
STEPS, EVERY, PROMPTS, SEED, TARGET, FROM = 30, 5, 128, 0, 1.6, 10
ARMS: dict[str, dict[str, Any]] = {
    "dr_grpo": {},
    "adaptive": {"use_adaptive_entropy": True, "entropy_target": TARGET},
    "controller": {},
}
_SETTINGS: dict[str, Any] = {
    "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "use_cpu": True, "bf16": False, "max_steps": STEPS,
    "seed": SEED, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2, "num_generations": 8, "max_completion_length": 16, "gradient_checkpointing": False,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def run(arm: str) -> Path:
    """Train an arm, and store what it was."""
    path = ROOT / "smollm2" / f"{arm}.json"
    if path.exists():
        return path
    config = load_config(TrainConfig, CONFIG, ["task.size=64", f"task.heldout_size={PROMPTS}"])
    task = load_task(config.task)
    model, tokenizer = load_model_and_tokenizer(config.model.name, device="cpu")
    model = add_lora(model, config.lora, SEED)
    torch.manual_seed(SEED)
    trainer = GRPOTrainer(
        model,
        list(task.reward_functions),
        args=GRPOConfig(output_dir=str(ROOT / "work" / f"smollm2-{arm}"), **_SETTINGS, **ARMS[arm]),
        train_dataset=Dataset.from_list(task.train),
        processing_class=tokenizer,
    )
    if arm == "controller":
        wanted = EntropyControllerConfig(target=TARGET)
        attach_entropy_controller(trainer, None, wanted, task.heldout, console=False)
    trainer.remove_callback(PrinterCallback)
    looks, begun = Looks(trainer, HeldOut(task.train, task.heldout, 16), EVERY, PROMPTS), time.perf_counter()
    trainer.add_callback(looks)
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    names = ("entropy", "reward", "step_time", "entropy_coef", "entropy_controller/alpha")
    logged = {name: [row.get(name) for row in history] for name in names if any(name in row for row in history)}
    stored = {"arm": arm, "target": TARGET, "seed": SEED, "steps": STEPS, "rows": looks.rows, "logged": logged}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**stored, "seconds": time.perf_counter() - begun}))
    return path


def distance(stored: dict[str, Any]) -> float:
    """Root mean square of entropy less target over the looks from step FROM on, nats per token."""
    off = [row["entropy"] - stored["target"] for row in stored["rows"] if row["step"] >= FROM]
    return math.sqrt(float(np.mean(np.square(off))))


def section() -> list[str]:
    """Lines of the study's page; none where nothing is stored."""
    if not RESULTS.exists():
        return []
    stored = json.loads(RESULTS.read_text())
    first, steps = stored[0], ", ".join(str(row["step"]) for row in stored[0]["rows"])
    lines = [
        "## SmolLM2-135M, one seed",
        "",
        f"`python -m benchmarks.study smollm2`: LoRA on the demo's task, {first['steps']} steps of 32 sequences, target "
        f"{first['target']:g} nats per token. Entropy on fresh completions of {PROMPTS} held-out prompts every {EVERY} steps; "
        f"distance from step {FROM} on. One seed shows a direction. Seconds are of a machine that others were using.",
        "",
        f"| arm | distance | entropy at steps {steps} | its error | last reward | s |",
        "|---|---|---|---|---|---|",
    ]
    for one in stored:
        rows = one["rows"]
        curve, error = ", ".join(f"{row['entropy']:.2f}" for row in rows), max(row["entropy_se"] for row in rows)
        lines.append(
            f"| {one['arm']} | {distance(one):.3f} | {curve} | {error:.2f} | {rows[-1]['reward']:.2f} | {one['seconds']:.0f} |"
        )
    return [*lines, ""]


def main() -> None:
    """All arms, then the file that the page is made of."""
    paths = [run(arm) for arm in ARMS]
    stored = [json.loads(path.read_text()) for path in paths]
    write_whole(RESULTS, json.dumps(stored, indent=1) + "\n")
    for one in stored:
        last = one["rows"][-1]
        print(
            f"{one['arm']:>10}: distance {distance(one):.3f}, entropy {last['entropy']:.2f}, reward {last['reward']:.2f}"
        )
