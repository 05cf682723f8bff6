"""What the entropy probe costs and how well it predicts, schedule by schedule, on a real collapse of SmolLM2-135M.

    python benchmarks/entropy_probe.py accuracy    one Dr-GRPO run; every schedule watches the same steps
    python benchmarks/entropy_probe.py overhead    single steps from its checkpoints, probe off and on in turn
    python benchmarks/entropy_probe_report.py      table and plot from both

Results go to benchmarks/results/entropy_probe/. `make bench-probe` runs all three (about an hour on two quiet cores).

accuracy: two correlations over the steps, kept apart. "same tokens": the newest gradient along the step against the change
measured on its own tokens (split estimator: is the first order right?). "independent": the logged prediction against the
change on 256 held-out prompts of which no schedule knows (is the estimate good for the policy?). The held-out completions are
drawn at every fourth step and weighted to the policy in between.
overhead: the same step of training, from the same state, with each schedule and without: CPU and wall seconds, peak memory.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work leave the cores to others

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from entropy_core.batch import Bucket, SequenceBatch
from entropy_core.fold_gradients import shared_statistics
from entropy_core.measurement import snis_entropy_change
from entropy_core.passes.shared_prefix import common_prefix_buckets
from entropy_experiments.records.writer import describe_environment
from rl_training.config import EntropyProbeConfig, TrainConfig
from rl_training.configuration import load_config, validate_config
from rl_training.integrations.trl import EntropyProbeCallback, attach_entropy_probe
from rl_training.sampling import draw, make_sampling_config
from rl_training.train import build_trainer

RESULTS = Path("benchmarks/results/entropy_probe")
RUN = Path("runs/bench-probe")
STEPS, SAVE_EVERY, HELD_OUT = 20, 5, 256

EVERY_STEP = {"mode": "simple", "preset": "accurate"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "accurate": EVERY_STEP,
    "default": {"mode": "simple"},
    "light": {"mode": "simple", "preset": "light"},
    "newest alone": {**EVERY_STEP, "averaging": 0.0},
    "8 sequences": {**EVERY_STEP, "eval_sequences": 8},
    "Rao-Blackwell": {**EVERY_STEP, "estimator": "rao_blackwell"},
    "previous step": {**EVERY_STEP, "rollouts": "previous_step"},
    "fused": {**EVERY_STEP, "fused": True, "eval_sequences": 4},
}
RIVALS = {**EVERY_STEP, "predictors": True, "eval_sequences": 8}


def config(*overrides: str) -> TrainConfig:
    return load_config(
        TrainConfig,
        Path(__file__).parents[1] / "rl_training" / "cfg" / "testconfig.yaml",
        [
            f"training.steps={STEPS}",
            f"training.save_every={SAVE_EVERY}",
            "training.report_to=[]",
            f"training.output_dir={RUN}",
            "optimizer.learning_rate=2e-4",
            "task.arguments.max_terms=3",
            "training_buffer.max_refill_rounds=1",
            f"task.heldout_size={HELD_OUT}",
            "entropy_probe.enabled=false",
            *overrides,
        ],
    )


def probe_config(settings: dict[str, Any]) -> EntropyProbeConfig:
    return validate_config(EntropyProbeConfig, {"on_error": "raise", **settings})


def short_rows(batch: SequenceBatch) -> list[Bucket]:
    return common_prefix_buckets(batch, tokens_per_row=256)


class Independent(TrainerCallback):
    """Each step's change of entropy on 256 held-out prompts, by reweighting; redrawn at every fourth step."""

    def __init__(self, trainer: Any, rows: list[dict[str, Any]]) -> None:
        self._trainer, self._rows = trainer, rows
        self._sampling_config = make_sampling_config(
            trainer.model, trainer.processing_class, 1.0, trainer.args.max_completion_length
        )
        self._batch = self._before = self._drawn_scores = None
        self.changes: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 4 == 0:
            model = self._trainer.model
            found = draw(
                model,
                self._trainer.processing_class,
                self._rows,
                1,
                self._sampling_config,
                7000 + state.global_step,
                "",
            )
            self._batch = found.to_batch(self._sampling_config)
            self._before = shared_statistics(model, self._batch, short_rows)
            self._drawn_scores = self._before.scores()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = shared_statistics(self._trainer.model, self._batch, short_rows)
        weights = self._before.scores() - self._drawn_scores
        self.changes.append(snis_entropy_change(self._before, after, self._batch, True, weights))
        self._before = after


class StepTimes(TrainerCallback):
    """Wall and CPU seconds of each step, and the highest resident memory in it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop, self._peak = threading.Event(), 0
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()
        self._begun = time.perf_counter(), time.process_time()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.is_set():
            self._peak = max(self._peak, process.memory_info().rss)
            self._stop.wait(0.1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, cpu = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        self._stop.set()
        self._watch.join()
        self.steps.append({"wall": wall, "cpu": cpu, "peak_gib": self._peak / 2**30})


def accuracy() -> None:
    trainer, task = build_trainer(config())
    probes = {
        name: attach_entropy_probe(trainer, probe_config(settings), task.heldout, console=False)
        for name, settings in {**SCHEDULES, "rivals": RIVALS}.items()
    }
    independent, times = Independent(trainer, task.heldout), StepTimes()
    trainer.add_callback(independent)
    trainer.callback_handler.callbacks.insert(0, times)
    trainer.add_callback(Record(probes, independent, times))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "steps.jsonl").unlink(missing_ok=True)
    (RESULTS / "environment.json").write_text(json.dumps(describe_environment(), indent=1) + "\n")
    trainer.train()


class Record(TrainerCallback):
    """One line a step in steps.jsonl."""

    def __init__(self, probes: dict[str, EntropyProbeCallback], independent: Independent, times: StepTimes) -> None:
        self._probes, self._independent, self._times = probes, independent, times
        self._entries = dict.fromkeys(probes, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measured = self._independent.changes[-1]
        line: dict[str, Any] = {
            "step": state.global_step,
            "independent": measured.change,
            "independent_se": measured.standard_error,
            "independent_ess": measured.effective_sample_size,
            "entropy": measured.before,
            "schedules": {},
        }
        for name, probe in self._probes.items():
            if (
                len(probe.history) == self._entries[name]
            ):  # a probe of earlier rollouts has nothing to say of the first step
                continue
            self._entries[name] += 1
            change, (wall, cpu) = probe.history[-1], probe.costs[-1]
            seen = change.measured
            line["schedules"][name] = {
                "predicted": change.total.value,
                "predicted_se": change.total.standard_error,
                "batch": change.batch.value,
                "momentum": change.momentum.value,
                "same_tokens": change.same_tokens,
                "measured": None if seen is None else seen.change,
                "measured_fixed_prefix": None if seen is None else change.measured_fixed_prefix.change,
                "ess": None if seen is None else seen.effective_sample_size,
                "wall": wall,
                "cpu": cpu,
                "predictors": change.predictors,
            }
        with (RESULTS / "steps.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
        predicted = line["schedules"]["accurate"]["predicted"]
        print(f"step {state.global_step}: independent {measured.change:+.4f}, accurate {predicted:+.4f}", flush=True)


OVERHEAD_ARMS = ("accurate", "light", "fused")


def overhead() -> None:
    """From each checkpoint one step per arm in turn, plain steps before, between and after them."""
    path = RESULTS / "overhead.jsonl"
    path.unlink(missing_ok=True)
    for checkpoint in sorted(RUN.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[:-1]:
        step = int(checkpoint.name.split("-")[1])
        for arm in ["off", *(name for watched in OVERHEAD_ARMS for name in (watched, "off"))]:
            cost = one_step(checkpoint, step, SCHEDULES.get(arm))
            with path.open("a") as handle:
                handle.write(json.dumps({"checkpoint": step, "arm": arm, **cost}) + "\n")
            print(step, arm, {k: round(v, 2) for k, v in cost.items()}, flush=True)


def one_step(checkpoint: Path, step: int, settings: dict[str, Any] | None) -> dict[str, float]:
    trainer, task = build_trainer(
        config(f"training.steps={step + 1}", "training.save_every=100000", f"training.output_dir={RUN}-overhead")
    )
    times = StepTimes()
    if settings is not None:
        attach_entropy_probe(trainer, probe_config({**settings, "refresh_every": 1}), task.heldout, console=False)
    trainer.callback_handler.callbacks.insert(0, times)
    trainer.args.save_strategy = "no"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return times.steps[0]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    np.set_printoptions(precision=4)
    commands = {"accuracy": accuracy, "overhead": overhead}
    commands[sys.argv[1]]()
