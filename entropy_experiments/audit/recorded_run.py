"""What a run left behind that its log can be compared with: settings, sequences of every step,
checkpoints, the log itself.

Sequences come from `recorded_steps/` (rl_training.run.step_record), which any GRPOTrainer can
write, or else from `rollouts/`, which the trainer of this project always writes and which does not
say in which micro-batch a sequence was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.folder import read_trainer_state
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts, rollouts_path
from rl_training.run.sidecar import Sidecar, read_sidecar
from rl_training.run.step_record import GENERATED, LOSS, RunSettings, read_settings, read_step, step_path

_WIDEST = 10**6  # tokens of a padded completion
_HOW_TO_RECORD = (
    "nothing says what its steps generated and trained on. Train with `entropy-experiments train`, or in a TRL script of your "
    "own add `from rl_training.integrations.step_recorder import record_steps; record_steps(trainer)` before trainer.train()"
)


@dataclass(frozen=True)
class Sequence:
    """One recorded sequence.

    Attributes:
        mask: which tokens of the completion count.
        width: columns of its padded micro-batch or round.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    width: int
    rank: int = 0
    rewards: tuple[float | None, ...] | None = None
    sampler_logprobs: tuple[float | None, ...] | None = None
    kept: bool = True
    """Of a generated sequence: whether it went into the training buffer, where that is recorded."""

    @property
    def length(self) -> int:
        """Tokens that count."""
        return sum(self.mask)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        rounds: what each call of the generator returned.
        micro_batches: what was in the loss.
        order_known: whether the micro-batches are those of the run (else all sequences of the loss
            are one).
    """

    step: int
    rounds: tuple[tuple[Sequence, ...], ...]
    micro_batches: tuple[tuple[Sequence, ...], ...]
    order_known: bool = True
    micro_batch_count: int = 1


@dataclass
class RecordedRun:
    """A run folder.

    Attributes:
        checkpoints: step -> folder.
        log: the longest log_history of its checkpoints.
    """

    folder: Path
    settings: RunSettings
    checkpoints: dict[int, Path]
    log: list[dict[str, Any]]
    steps: dict[int, Callable[[], StepRecord]] = field(default_factory=dict)
    other_rewards: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], float]] = field(default_factory=dict)
    """What other reward functions give (prompt, completion), by name."""

    def __post_init__(self) -> None:
        self.record = lru_cache(maxsize=None)(lambda step: self.steps[step]() if step in self.steps else None)


def read_run(path: str | Path) -> RecordedRun:
    """Raises UserError for a folder that is no run, has no checkpoint with a log, or recorded no
    sequences.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: name a run folder")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name the run folder it lies in")
    if (folder / "trainer_state.json").exists() and re.fullmatch(r"checkpoint-\d+", folder.name):
        raise UserError(
            f"{folder} is one checkpoint, and an audit needs those before and after it: name the run, {folder.parent}"
        )
    checkpoints = {
        int(m.group(1)): child
        for child in folder.iterdir()
        if (m := re.fullmatch(r"checkpoint-(\d+)", child.name)) and child.is_dir()
    }
    logged = {step: child for step, child in checkpoints.items() if (child / "trainer_state.json").exists()}
    if not logged:
        raise UserError(
            f"{folder} has no checkpoint-* folder with a trainer_state.json: the log stands there; name a run folder, and train "
            "with checkpoints (save_steps)"
        )
    last = max(logged)
    settings, steps = read_settings(folder), {}
    sidecar = read_sidecar(logged[last])
    if settings is not None:
        for file in sorted((folder / step_path(folder, 1).parent.name).glob("step-*.parquet")):
            if m := re.fullmatch(r"step-(\d+)\.parquet", file.name):
                steps[int(m.group(1))] = _from_record(folder, int(m.group(1)), sidecar is not None)
    elif sidecar is not None and (folder / "rollouts").is_dir():
        settings = _settings_of(sidecar)
        state = read_trainer_state(logged[last])
        for file in sorted((folder / "rollouts").glob("step-*.parquet")):
            if m := re.fullmatch(r"step-(\d+)\.parquet", file.name):
                steps[int(m.group(1))] = _from_rollouts(folder, int(m.group(1)), sidecar, state.get("train_batch_size"))
    if settings is None or not steps:
        raise UserError(f"{folder} cannot be audited: {_HOW_TO_RECORD}")
    log = read_trainer_state(logged[last]).get("log_history", [])
    return RecordedRun(folder, settings, dict(sorted(checkpoints.items())), log, steps)


def _from_record(folder: Path, step: int, own_trainer: bool) -> Callable[[], StepRecord]:
    def read() -> StepRecord:
        rows = read_step(folder, step) or []
        kept = _trained_sequences(folder, step) if own_trainer else None
        parts: dict[str, dict[int, list[Sequence]]] = {GENERATED: {}, LOSS: {}}
        for row in rows:
            if (trouble := _trouble(row)) is not None:
                raise UserError(f"{step_path(folder, step)} is damaged: {trouble}")
            tokens = (tuple(row["prompt_ids"]), tuple(row["completion_ids"]))
            sequence = Sequence(
                *tokens,
                tuple(row["mask"]),
                row["width"],
                row["rank"],
                None if row["rewards"] is None else tuple(row["rewards"]),
                None if row["sampler_logprobs"] is None else tuple(row["sampler_logprobs"]),
                kept is None or tokens in kept,
            )
            parts[row["part"]].setdefault(row["batch"], []).append(sequence)
        rounds, loss = (tuple(tuple(batch[n]) for n in sorted(batch)) for batch in parts.values())
        return StepRecord(step, rounds, loss, True, len(loss))

    return read


def _trouble(row: dict[str, Any]) -> str | None:
    """What no recorder writes."""
    if row["part"] not in (GENERATED, LOSS) or row["batch"] is None:
        return "a row is of no known part"
    count = len(row["completion_ids"] or ())
    if not row["prompt_ids"] or not count or len(row["mask"] or ()) != count:
        return "a prompt or a completion is empty, or its mask has another length"
    if any(value is None for name in ("prompt_ids", "completion_ids", "mask") for value in row[name]):
        return "tokens or masks are missing"
    if row["rank"] is None or row["width"] is None or not count <= row["width"] <= _WIDEST:
        return "its padded width is none"
    if row["sampler_logprobs"] is not None and len(row["sampler_logprobs"]) != count:
        return "the sampler's log-probabilities are not those of its completion"
    return None


def _trained_sequences(folder: Path, step: int) -> set[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    if not rollouts_path(folder, step).exists():
        return None
    return {(s.prompt_ids, s.completion_ids) for s in read_rollouts(folder, step) if s.status != "rejected"}


def _from_rollouts(folder: Path, step: int, sidecar: Sidecar, batch_size: Any) -> Callable[[], StepRecord]:
    def read() -> StepRecord:
        rounds: dict[int, list[Sequence]] = {}
        for s in read_rollouts(folder, step):
            drawn, width = s.drawn or (True,) * len(s.completion_ids), len(s.completion_ids)
            kept = s.status != "rejected"
            rounds.setdefault(s.round, []).append(
                Sequence(s.prompt_ids, s.completion_ids, drawn, width, s.rank, (s.reward,), None, kept)
            )
        loss = tuple(s for number in sorted(rounds) for s in rounds[number] if s.kept)
        known = isinstance(batch_size, int) and batch_size > 0
        count = max(1, round(len(loss) / (batch_size * sidecar.rank_count))) if known else 1
        return StepRecord(step, tuple(tuple(rounds[n]) for n in sorted(rounds)), (loss,), known and count == 1, count)

    return read


def _settings_of(sidecar: Sidecar) -> RunSettings:
    """What a checkpoint of this project's trainer says of the same things."""
    sampling = sidecar.sampling
    return RunSettings(
        temperature=sampling.temperature,
        max_completion_length=sampling.max_completion_length,
        eos_token_ids=sampling.eos_token_ids,
        pad_token_id=sampling.pad_token_id,
        completions_per_prompt=sampling.completions_per_prompt,
        reward_names=[],
        reward_weights=[1.0],
        mixed_precision=sidecar.mixed_precision,
        mask_truncated_completions=False,
        beta=0.0,
        dtype=sidecar.dtype,
        model_name=sidecar.model_name,
        sampler_departures=[],
    )
