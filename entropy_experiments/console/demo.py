"""The demo: a real entropy collapse in a few minutes, and the report that explains it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from rich.console import Console

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console.analyze import analyze_with_progress
from entropy_experiments.console.watch import watched
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.errors import UserError

TRAIN_CONFIG = Path(__file__).parents[2] / "rl_training" / "cfg" / "testconfig.yaml"
ANALYSIS_CONFIG = Path(__file__).parents[1] / "configs" / "fisher_analysis.yaml"

# Three quarters of the sequences of the configuration, to be done sooner, at one and a half times its learning rate.
TRAIN_OVERRIDES = (
    "optimizer.learning_rate=3e-4",
    "rollouts.prompts_per_step=6",
    "training_buffer.max_refill_rounds=1",
    "entropy_probe.eval_sequences=20",
)

# Half of the usual size, and none of the many real steps that are measured, so that two cores are done in time.
ANALYSIS_OVERRIDES = (
    "entropy_analysis.eval_batch_size=32",
    "entropy_analysis.train_batch_size=32",
    "entropy_analysis.analysis.step_scales=[0.25, 0.5, 1.0, 2.0]",
    "entropy_analysis.analysis.fresh_scales=[]",
    "entropy_analysis.analysis.intervention=false",
    "entropy_analysis.analysis.weighting_steps=false",
)


def next_free_folder(output: Path) -> Path:
    """`<output>/demo-1`, or the first number that is free: a second demo makes a second run."""
    number = 1
    while (output / f"demo-{number}").exists():
        number += 1
    return output / f"demo-{number}"


def run_demo(output: Path) -> Path:
    """Train, analyse the last checkpoint, and return the report's path."""
    from rl_training.train import run_training

    console = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    folder = next_free_folder(output)
    console.print(f"1/2  Dr. GRPO on SmolLM2-135M; the run goes to {folder}")
    train_config = load_config(TrainConfig, TRAIN_CONFIG, [*TRAIN_OVERRIDES, f"training.output_dir={folder}"])
    with contextlib.ExitStack() as held:
        try:
            console.print(f"     watch it in a browser: {held.enter_context(watched(folder))}")
        except UserError as error:
            console.print(f"     no page to watch it on: {error}")
        run_training(train_config)
    console.print(f"2/2  Fisher analysis of its last checkpoint ({time.perf_counter() - started:.0f} s so far)")
    analysis_config = load_config(FisherAnalysisConfig, ANALYSIS_CONFIG, ANALYSIS_OVERRIDES)
    analysis = analyze_with_progress(folder, analysis_config, folder=folder / "analysis")
    console.print(f"done in {time.perf_counter() - started:.0f} s. Open the report in a browser:")
    return analysis.report.resolve()
