"""Any dump of rollouts as one table: a file or a folder, told by what its rows hold and by the names of its files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import ModuleType

from entropy_experiments.buffers.dumps import open_instruct, own, prime_rl, recorded_steps, trl, verl
from entropy_experiments.buffers.dumps.files import is_parquet, parquet_names, parquet_note, rows_of, unit_of
from entropy_experiments.buffers.dumps.rows import Mistakes, RolloutRow, RolloutTable, all_or_none
from rl_training.errors import UserError
from rl_training.tasks.json_lines import regular_file

# In the order of asking: what other trainers write is told first, and each by keys that no other has.
READERS: tuple[ModuleType, ...] = (verl, open_instruct, prime_rl, trl, recorded_steps, own)
_FOLDERS_INSIDE = ("rollouts", "recorded_steps", "completions")
_KNOWN = ", ".join(reader.NAME for reader in READERS)


def import_rollouts(path: str | Path, step: int | None = None, unfiltered: bool = False) -> RolloutTable:
    """The sequences of a dump.

    Args:
        path: a file, or the folder that a trainer wrote its dumps to.
        step: take the sequences of this optimizer step alone, counted from 1; None: all.
        unfiltered: where a trainer keeps both, what was generated in place of what was trained on.

    Returns:
        The table; its notes say what the format leaves open.

    Raises:
        UserError: no such dump, no rows of that step, or bad rows: all of them by number, the first with what is wrong.
    """
    path = Path(path).expanduser()
    files = _files(path, step, unfiltered) if path.is_dir() else [(path, _step_of(path))]
    readers, rows, notes = set(), [], []
    for file, file_step in files:
        reader = _reader_of(file)
        readers.add(reader.NAME)
        found = _read(file, reader, file_step, step)
        notes += [note for note in found.notes if note not in notes]
        rows += found.rows
    if len(readers) > 1:
        raise UserError(f"{path} holds dumps of several kinds ({', '.join(sorted(readers))}): name one file")
    table = RolloutTable(path, readers.pop(), rows, tuple(notes))
    if not rows:
        of_step = "" if step is None else f" of step {step}"
        raise UserError(f"{path} holds no sequences{of_step}{_steps_there(path)}")
    return table


def is_dump(path: str | Path) -> bool:
    """Whether a path holds rollouts in one of the known formats, rather than the plain texts of `buffers/custom.py`."""
    path = Path(path).expanduser()
    if path.is_dir():
        return True
    return path.is_file() and path.stat().st_size > 0 and (is_parquet(path) or _first_match(path) is not None)


def dump_steps(path: str | Path) -> list[int]:
    """Optimizer steps of a folder's files, as their names say; [] for a file or where names do not say."""
    path = Path(path)
    steps = {s for _, s in _files(path, None, False) if s is not None} if path.is_dir() else set()
    return sorted(steps)


def _steps_there(path: Path) -> str:
    steps = dump_steps(path)
    return f"; it has steps {steps[0]} to {steps[-1]}" if steps else ""


def _files(folder: Path, step: int | None, unfiltered: bool) -> list[tuple[Path, int | None]]:
    """The dump files of a folder with the step that their names say, in the order of steps."""
    episodes = _episodes(folder, unfiltered)
    if not episodes:
        places = [folder, *(folder / name for name in _FOLDERS_INSIDE)]
        for place in (p for p in places if p.is_dir()):
            if episodes := [(p, _step_of(p)) for p in place.iterdir() if p.is_file() and _named(p)]:
                break
    if not episodes:
        raise UserError(
            f"{folder} holds no dumps of rollouts (of {_KNOWN}): name the file, or the folder that they were written to"
        )
    chosen = [(p, s) for p, s in episodes if step is None or s in (None, step)]
    if not chosen:
        steps = sorted({s for _, s in episodes if s is not None})
        raise UserError(f"{folder} holds no rollouts of step {step}; it has steps {steps[0]} to {steps[-1]}")
    return sorted(chosen, key=lambda pair: (pair[1] or 0, pair[0].name))


def _named(path: Path) -> re.Match[str] | None:
    return next((m for reader in READERS if (m := re.fullmatch(reader.FILES, path.name))), None)


def _episodes(folder: Path, unfiltered: bool) -> list[tuple[Path, int | None]]:
    """prime-rl's: below the run, its rollouts, or one step's folder."""
    subset = "all" if unfiltered else "effective"
    for pattern in ("rollouts/step_*", "step_*", "."):
        steps = [folder] if pattern == "." else folder.glob(pattern)
        if found := [p for step in steps if (p := step / "train" / subset / "traces.jsonl").is_file()]:
            return [(p, _step_of(p)) for p in found]
    return []


def _step_of(file: Path) -> int | None:
    """The step that the file's name says, or of episodes the folder's."""
    if (named := _named(file)) is not None and named.groupdict().get("step"):
        return int(named["step"])
    above = [int(m[1]) for p in file.resolve().parents[:3] if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return above[0] if above and file.name == "traces.jsonl" else None


def _first_match(file: Path) -> ModuleType | None:
    if is_parquet(file):
        keys = set(parquet_names(file))
    else:
        first = next((data for _, data in rows_of(file) if isinstance(data, dict)), None)
        keys = set(first or ())
    return next((reader for reader in READERS if reader.matches(keys)), None)


def _reader_of(file: Path) -> ModuleType:
    regular_file(file, str(file))
    reader = _first_match(file)
    if reader is None and (why := _no_rows(file)) is not None:
        raise UserError(f"{file} {why}")
    if reader is None:
        raise UserError(
            f"{file} is no dump of rollouts that is known (of {_KNOWN}): write prompt_ids and completion_ids of each sequence, "
            "as docs/guides/rollouts.md says"
        )
    return reader


def _no_rows(file: Path) -> str | None:
    """Why a file has no rows at all, with the remedy; None where it has some."""
    if is_parquet(file):
        return None
    with file.open("rb") as handle:
        start = handle.read(4)
    if start.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK", b"BZh")):
        return "is compressed: unpack it"
    first = next((data for _, data in rows_of(file)), "has no line")
    return (
        None
        if isinstance(first, dict)
        else f"is no dump of rollouts: its first line is {first}; write one JSON object a line"
    )


def _read(file: Path, reader: ModuleType, file_step: int | None, step: int | None) -> RolloutTable:
    mistakes = Mistakes(file, unit_of(file))
    rows: list[RolloutRow] = []
    numbers: list[int] = []
    unused: Counter[str] = Counter()
    sequences = reader.sequences_of(file) if hasattr(reader, "sequences_of") else reader.sequences
    for number, data in rows_of(file):
        if isinstance(data, str):
            mistakes.add(number, data)
            continue
        try:
            if not reader.matches(set(data)):
                raise ValueError(
                    f"is no row of {reader.NAME}, as the first is: it has {', '.join(sorted(data))[:80] or 'nothing'}"
                )
            found = [row for row in sequences(data, f"{mistakes.unit} {number}", file_step)]
        except ValueError as error:
            mistakes.add(number, error)
            continue
        kept = [row for row in found if step is None or row.step in (None, step)]
        rows += kept
        numbers += [number] * len(kept)
        if reader is own:
            unused.update(key for key in data if key not in own.KNOWN)
    all_or_none(rows, mistakes, numbers)
    mistakes.refuse()
    notes = list(parquet_note(file, "rollouts").get("notes", [])) if is_parquet(file) else []
    notes += reader.notes(rows, file) if rows else []
    if unused:
        notes.append(f"{file.name} has columns that are not used: {', '.join(sorted(unused))[:120]}")
    return RolloutTable(file, reader.NAME, rows, tuple(notes))
