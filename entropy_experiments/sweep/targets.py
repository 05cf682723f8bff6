"""What a sweep will analyse: its runs by name, and of each run the checkpoints that were chosen."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_experiments.sweep.config import CheckpointSelection, SweepConfig
from entropy_experiments.text.display import one_line
from rl_training.errors import UserError
from rl_training.run.rollouts import rollouts_path
from rl_training.run.sidecar import read_sidecar

_logger = logging.getLogger(__name__)

_MOST_RUNS_IN_A_NAME = 3


@dataclass(frozen=True)
class Target:
    """One checkpoint to analyse; run: the run's name within the sweep."""

    run: str
    step: int
    path: Path

    @property
    def name(self) -> str:
        """Its results folder's name."""
        return f"{self.run}_checkpoint-{self.step}"


def name_runs(runs: Sequence[str | Path]) -> dict[str, Path]:
    """Run name -> folder, in the order given; runs of one name are distinguished by the folder above them.

    Raises UserError for no run, a path that is no run folder, a run given twice, or names that stay the same.
    """
    if not runs:
        raise UserError("name at least one run folder to sweep over")
    folders = []
    for run in map(Path, runs):
        if not run.exists():
            raise UserError(f"{run} does not exist: name a run folder, the one that holds checkpoint-* folders")
        if not run.is_dir():
            raise UserError(f"{run} is a file: name the run folder, the one that holds checkpoint-* folders")
        if (run / "trainer_state.json").exists():
            raise UserError(f"{run} is a single checkpoint: name its run folder, or use `entropy-experiments analyze`")
        folders.append(run.resolve())
    twice = next((folder for folder, count in Counter(folders).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice: name each run once")
    counts = Counter(folder.name for folder in folders)
    names = [f.name if counts[f.name] == 1 else f"{f.parent.name}-{f.name}" for f in folders]
    if len(set(names)) < len(names):
        raise UserError(
            f"two runs would both be called {Counter(names).most_common(1)[0][0]}: rename one of their folders"
        )
    return dict(zip(names, folders, strict=True))


def choose_checkpoints(run: Path, selection: CheckpointSelection) -> list[tuple[int, Path]]:
    """(step, folder) of the chosen checkpoints by step. Raises UserError where there are none, or one asked for is missing."""
    found = {
        int(match[1]): child
        for child in run.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", child.name)) and child.is_dir()
    }
    steps = sorted(found)
    if not steps:
        raise UserError(f"{run} has no checkpoint-* folders: is it a run folder, and did the run save any?")
    if selection.steps is not None:
        missing = sorted(set(selection.steps) - found.keys())
        if missing:
            listed = ", ".join(map(str, steps))
            raise UserError(f"{run} has no checkpoint of step {missing[0]} (checkpoints.steps); it has {listed}")
        steps = sorted(set(selection.steps))
    elif selection.stride is not None:
        steps = sorted({*steps[:: selection.stride], steps[-1]})
    elif selection.last is not None:
        steps = steps[-selection.last :]
    return [(step, found[step]) for step in steps]


def plan_sweep(runs: dict[str, Path], config: SweepConfig) -> list[Target]:
    """Every checkpoint to analyse, run by run.

    Raises UserError as `choose_checkpoints`, `_with_a_next_step` and `_refuse_two_distributions` do.
    """
    chosen = {name: choose_checkpoints(run, config.checkpoints) for name, run in runs.items()}
    if config.entropy_analysis.sampling.eval_prompts == "from_run":
        asked = config.checkpoints.steps is not None
        chosen = {name: _with_a_next_step(runs[name], found, asked) for name, found in chosen.items()}
    for name, found in chosen.items():
        _refuse_two_distributions(runs[name], found)
    return [Target(name, step, path) for name, found in chosen.items() for step, path in found]


def _with_a_next_step(run: Path, found: list[tuple[int, Path]], asked: bool) -> list[tuple[int, Path]]:
    """Those whose next step the run recorded: a run's last checkpoint has none, and is left out with a word.

    asked: whether the user named the steps. Raises UserError where a step was asked for that has none, or nothing is left.
    """
    without = [step for step, _ in found if not rollouts_path(run, step + 1).exists()]
    words = (
        f"the run recorded nothing of the step after, which eval_prompts=from_run takes: {', '.join(map(str, without))}"
    )
    if without and (asked or len(without) == len(found)):
        raise UserError(
            f"{run}: of these checkpoints {words}; leave them out (checkpoints.steps), or take eval_prompts=fixed_set"
        )
    if without:
        _logger.warning("%s: checkpoints are left out, for %s", run, words)
    return [(step, path) for step, path in found if step not in without]


def _refuse_two_distributions(run: Path, found: list[tuple[int, Path]]) -> None:
    """Raises UserError where the records of a run's checkpoints say that completions came from more than one distribution: the
    difference of two entropies would then be none of training. Damaged records are left to the analysis of their checkpoint.
    """
    first: dict[str, tuple[int, object]] = {}
    for step, path in found:
        for name, value in _distribution(path).items():
            earlier, other = first.setdefault(name, (step, value))
            if other != value:
                raise UserError(
                    f"{run}: {name} is {_short(other)} at checkpoint {earlier} and {_short(value)} at checkpoint {step}: "
                    "entropies of two distributions are no course of training; sweep over the steps of each part alone "
                    "(checkpoints.steps)"
                )


def _distribution(path: Path) -> dict[str, object]:
    """What says which distribution completions come from, but for the weights; {} where nothing is recorded."""
    try:
        sidecar = read_sidecar(path)
    except UserError:
        return {}
    if sidecar is None:
        return {}
    sampling = sidecar.sampling
    said = {
        "temperature": sampling.temperature,
        "max_completion_length": sampling.max_completion_length,
        "eos_token_ids": sorted(sampling.eos_token_ids),
        "the digest of the chat template": sampling.chat_template_sha256,
        "chat_template_kwargs": sampling.chat_template_kwargs,
    }
    return {name: value for name, value in said.items() if value is not None}


def _short(value: object) -> str:
    return one_line(str(value), 60)


def sweep_name(runs: dict[str, Path]) -> str:
    """What the sweep's folder is called: its runs' names."""
    names = list(runs)
    if len(names) > _MOST_RUNS_IN_A_NAME:
        names = [*names[: _MOST_RUNS_IN_A_NAME - 1], f"{len(names) - _MOST_RUNS_IN_A_NAME + 1}-more"]
    return "+".join(names)
