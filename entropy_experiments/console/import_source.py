"""`import`: a run of ours out of another trainer's checkpoints."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from entropy_experiments.buffers.dumps.read import dump_steps, import_rollouts
from entropy_experiments.buffers.dumps.rows import RolloutTable
from entropy_experiments.checkpoints.folder import existing_folder
from entropy_experiments.checkpoints.foreign import foreign_layout
from entropy_experiments.checkpoints.import_checkpoint import Imported, fill_checkpoint
from entropy_experiments.checkpoints.imported import IMPORT_RECORD
from entropy_experiments.checkpoints.readers.layouts import Source, find_sources
from entropy_experiments.checkpoints.readers.trained_state import TrainedState
from entropy_experiments.checkpoints.validation import examine_checkpoint
from rl_training.errors import UserError
from rl_training.files import PART, own_folder, refuse_link, rename_whole
from rl_training.run.folder_lock import locked
from rl_training.run.sidecar import SIDECAR_NAME

ROLLOUTS_FILE = "rollouts.parquet"
_LEFT = re.compile(r"\.checkpoint-\d+\.[0-9a-f]{16}" + re.escape(PART))


def import_run(source: Path, output: Path, model: str | None = None, rollouts: Path | None = None) -> list[Imported]:
    """Make a run folder of ours out of a checkpoint, or of all checkpoints of a run.

    Args:
        source: A folder of any layout that is read (entropy_experiments.checkpoints.readers).
        output: The run folder; `checkpoint-<step>` appear in it whole or not at all, and nothing is
            overwritten.
        model: Folder or name with configuration and tokenizer, where the source has none.
        rollouts: A dump of sequences (docs/guides/rollouts.md); those of each checkpoint's next
            step come beside it.

    Returns:
        One for each checkpoint, in the order of steps.

    Raises:
        UserError: Where a checkpoint is damaged, partial or of no layout that is read, where it
            could not be analysed once imported, or where the output holds that step already.
    """
    _refuse_unread(existing_folder(source))
    sources = find_sources(source)
    for found in sources:
        _refuse_our_own(found.folder)
    states = [found.read() for found in sources]
    steps = [state.step for state in states]
    if len({step or 0 for step in steps}) < len(steps):
        raise UserError(f"{source} holds two checkpoints of one step ({steps}): name the folder of one of them")
    made_here = not output.exists()
    own_folder(output)
    try:
        return _import_all(states, sources, output, model, rollouts)
    finally:
        if made_here:
            with contextlib.suppress(OSError):  # not empty: something was imported
                output.rmdir()


def _refuse_unread(folder: Path) -> None:
    """Raises UserError for a layout that is known and not read."""
    foreign = foreign_layout(folder)
    if foreign is not None and not foreign.imported:
        raise UserError(f"{folder}: {foreign.what}, which is not read. {foreign.weights}")


def _refuse_our_own(folder: Path) -> None:
    """Raises UserError for a checkpoint that is analysed as it is, with more of its run than an
    import would keep.
    """
    ours = (folder / SIDECAR_NAME).exists() and (folder / "optimizer.pt").exists()
    if ours or (folder / IMPORT_RECORD).exists():
        raise UserError(f"{folder} is a checkpoint of this project: analyse it as it is")


def _import_all(
    states: list[TrainedState], sources: list[Source], output: Path, model: str | None, rollouts: Path | None
) -> list[Imported]:
    with locked(output / ".lock", str(output)):
        _remove_leftovers(output)
        for state in states:
            target = _target(output, state)
            if target.exists():
                raise UserError(
                    f"{target} exists already: nothing is overwritten; choose another --output, or remove it"
                )
        return [
            _import_one(state, found, output, model, rollouts) for state, found in zip(states, sources, strict=True)
        ]


def _remove_leftovers(output: Path) -> None:
    """Remove what killed imports were writing here."""
    for path in output.glob(f".checkpoint-*{PART}"):
        if _LEFT.fullmatch(path.name):
            refuse_link(path)
            shutil.rmtree(path)


def _target(output: Path, state: TrainedState) -> Path:
    return output / f"checkpoint-{state.step or 0}"


def _import_one(
    state: TrainedState, source: Source, output: Path, model: str | None, rollouts: Path | None
) -> Imported:
    target = _target(output, state)
    part = output / f".{target.name}.{secrets.token_hex(8)}{PART}"
    part.mkdir()
    try:
        dump = None if rollouts is None else _sequences(rollouts, state.step or 0)
        beside = {}
        if dump is not None:
            dump.table.write(part / ROLLOUTS_FILE)
            beside[ROLLOUTS_FILE] = dump.origin
        made = fill_checkpoint(state, source.folder, part, model, beside)
        found = examine_checkpoint(part, model_name=model if (part / "adapter_config.json").exists() else None)
        found.refuse(False)
        if found.optimizer_problems and made.moments:
            raise UserError(found.optimizer_problems[0])
        refuse_link(target)
        rename_whole(part, target)
    except UserError as error:
        raise UserError(str(error).replace(str(part), str(source.folder))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Imported(target, made.record, made.weights, made.moments, found.rate_problem)


@dataclass(frozen=True)
class _Dump:
    table: RolloutTable
    origin: str


def _sequences(rollouts: Path, step: int) -> _Dump:
    """Those that the checkpoint's policy drew, for the step that came next; without them those of
    its last step.

    Raises UserError where the dump has neither, or is damaged.
    """
    steps = dump_steps(rollouts)
    wanted = step + 1 if step + 1 in steps or not steps else step
    try:
        table = import_rollouts(rollouts, wanted)
    except UserError:
        if wanted == step:
            raise
        wanted, table = step, import_rollouts(rollouts, step)
    by = "drawn by this policy" if wanted == step + 1 else "drawn by the policy before its last step"
    return _Dump(table, f"{rollouts}, {len(table)} sequences of step {wanted}, {by}")


def import_lines(made: list[Imported]) -> list[str]:
    """What was imported, for a person."""
    lines = []
    for one in made:
        moments = (
            f"moments of {one.moments} parameters" if one.moments else "no moments: analyse with preconditioning=none"
        )
        lines.append(f"{one.folder}: {one.record.layout}, step {one.record.step}: {one.weights} weights, {moments}")
        lines += [f"  {note}" for note in (*one.record.notes, *([one.to_give] if one.to_give else []))]
        if ROLLOUTS_FILE in one.record.origins:
            lines.append(
                f"  sequences: {one.record.origins[ROLLOUTS_FILE]}; analyse them with "
                f"entropy_analysis.sampling.train_sequences_path={one.folder / ROLLOUTS_FILE}"
            )
    return lines
