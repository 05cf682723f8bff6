"""What the checks that a training run makes of itself cost, as a share of its steps.

    python benchmarks/check_overhead.py [--steps 3] [override ...]

The run of rl_training/cfg/testconfig.yaml with a clock around every check: noise and padding when training begins, prompts, the
gradient against the recorded weights, the sampler, rows against autograd. Printed are the seconds of each, how often it ran, and
the share of 20 steps: what is done once counts once, what is done in every step 20 times. All clocks run in one process and one
run, so a busy machine slows both sides of the ratio alike. The table goes to benchmarks/results/check_overhead.md.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import entropy_core.passes.frozen_head
import entropy_core.passes.logits
from entropy_core.passes.fold_rows import FoldRows
from entropy_experiments.records.writer import describe_environment
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.premises.gradient_changes import GradientChanges
from rl_training.premises.gradient_premise import GradientPremise
from rl_training.premises.premise_guard import PremiseGuard
from rl_training.premises.probe_premise import ProbePremise
from rl_training.premises.sampling_check import SamplingGuard, SamplingWatcher
from rl_training.premises.surprisal_check import SamplerWatch
from rl_training.train import build_trainer

RESULT = Path(__file__).parent / "results" / "check_overhead.md"
CONFIG = Path(__file__).parents[1] / "rl_training" / "cfg" / "testconfig.yaml"
STEPS = 20

# What runs, under which name, and whether it is done in every step (else once a run, however long).
CHECKS: list[tuple[Any, str, str, bool]] = [
    (SamplingGuard, "on_train_begin", "noise and padding, when training begins", False),
    (SamplingWatcher, "on_train_begin", "noise and padding, when training begins", False),
    (SamplingGuard, "check_round", "prompts, and padding that cannot be borne", True),
    (GradientPremise, "_examine", "gradient against the recorded weights", False),
    (GradientChanges, "_keep", "gradient at the optimizer's call", True),
    (GradientChanges, "_compare", "gradient at the optimizer's call", True),
    (PremiseGuard, "expect", "weights of every token", True),
    (PremiseGuard, "on_pre_optimizer_step", "weights of every token", True),
    (ProbePremise, "hold", "weights of every token", True),
    (SamplerWatch, "take", "sampler: surprisal against entropy", True),
    (SamplerWatch, "look", "sampler: surprisal against entropy", True),
    (entropy_core.passes.frozen_head, "mean_square", "sampler: surprisal against entropy", True),
    (entropy_core.passes.logits, "mean_square", "sampler: surprisal against entropy", True),
    (FoldRows, "check", "rows against autograd", True),
]


@dataclass
class Clock:
    """Seconds and calls of one check; time inside another one's call is counted there alone."""

    every_step: bool
    seconds: float = 0.0
    calls: int = 0
    running = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if Clock.running:
                return function(*args, **kwargs)
            Clock.running = True
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                Clock.running = False
                self.seconds += time.perf_counter() - begun
                self.calls += 1

        return timed


class StepTimes(TrainerCallback):
    """Wall seconds of each step, generation and probe included."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self._begun)


def measure(steps: int, overrides: list[str]) -> tuple[dict[str, Clock], list[float]]:
    """Clocks by the name of their check, and the seconds of each step."""
    clocks: dict[str, Clock] = {}
    for owner, attribute, name, every_step in CHECKS:
        clock = clocks.setdefault(name, Clock(every_step))
        setattr(owner, attribute, clock.around(getattr(owner, attribute)))
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            TrainConfig,
            CONFIG,
            [
                f"training.steps={steps}", f"training.output_dir={folder}/run", f"training.save_every={steps}",
                "training.report_to=[]", "entropy_probe.on_error=raise", *overrides,
            ],
        )  # fmt: skip
        trainer, _ = build_trainer(config)
        times = StepTimes()
        trainer.callback_handler.callbacks.insert(0, times)
        trainer.train()
    return clocks, times.steps


def report(clocks: dict[str, Clock], steps: list[float], overrides: list[str]) -> str:
    """The table, and the share of 20 steps in per cent."""
    checked = sum(clock.seconds for clock in clocks.values())
    plain = (sum(steps) - sum(c.seconds for n, c in clocks.items() if "training begins" not in n)) / len(steps)
    lines = ["| check | calls | seconds | seconds in 20 steps | % of 20 steps |", "|---|---|---|---|---|"]
    total = 0.0
    for name, clock in clocks.items():
        in_all = clock.seconds * (STEPS / len(steps) if clock.every_step else 1.0)
        total += in_all
        lines.append(
            f"| {name} | {clock.calls} | {clock.seconds:.3f} | {in_all:.2f} | {in_all / (STEPS * plain):.2%} |"
        )
    lines.append(f"| **all** | | {checked:.3f} | {total:.2f} | **{total / (STEPS * plain):.2%}** |")
    environment = describe_environment()
    header = [
        "# What a run's checks of itself cost",
        "",
        f"`python benchmarks/check_overhead.py --steps {len(steps)}{''.join(f' {o}' for o in overrides)}`: "
        f"a step without checks took {plain:.1f} s ({', '.join(f'{s:.1f}' for s in steps)} s with them). "
        f"torch {environment['versions']['torch']}, {environment['hardware']['threads']} thread(s) of a shared machine: the "
        "ratio is to be read, not the seconds.",
        "",
    ]
    return "\n".join([*header, *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="keys of the configuration, e.g. entropy_probe.preset=default")
    given = parser.parse_args()
    text = report(*measure(given.steps, given.overrides), given.overrides)
    print(text)
    if not given.overrides:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
