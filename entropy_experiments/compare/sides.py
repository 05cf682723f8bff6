"""What is compared: folders of analyses, or of sweeps, checked for whether their numbers are of the same quantity.

Refused, because a difference would be of two different things: another tokenizer (entropy per token depends on what a token
is), given texts against texts drawn from the policy, a sweep against a single analysis. Compared with a caveat that the
report repeats: another sampling configuration, another model with the same tokenizer, another training step, another
evaluation set, another results format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from entropy_experiments.records.reader import ResultsFolder, read_results_folder
from entropy_experiments.records.sweep_record import read_sweep
from entropy_experiments.text.display import one_line
from entropy_experiments.text.numbers import as_number, plain
from rl_training.errors import UserError

LETTERS = "ABCDEFGH"
SWEEP_RECORD = "sweep.json"


@dataclass(frozen=True)
class Side:
    """A run that is compared: an analysis folder, or one run of a sweep.

    points: its analyses in order of training step, a single one for an analysis folder. missing: sentences on the checkpoints
    that a sweep has no analysis of.
    """

    letter: str
    name: str
    path: Path
    kind: Literal["analysis", "sweep"]
    points: tuple[ResultsFolder, ...]
    missing: tuple[str, ...] = ()

    @property
    def first(self) -> ResultsFolder:
        """The earliest of its analyses."""
        return self.points[0]

    @property
    def label(self) -> str:
        """Letter and name, fit for a legend."""
        return f"{self.letter}: {self.name}"


def step_of(results: ResultsFolder) -> int:
    """The training step of the checkpoint that was analysed."""
    return results.summary.checkpoint.step


def open_sides(paths: Sequence[Path | str]) -> list[Side]:
    """Read the folders, the first as A, the next as B, …; a sweep over several runs is a side for each of them.

    Raises UserError for fewer than two or more than eight sides, one folder twice, a folder that is none of ours, a sweep
    against an analysis, and for numbers that are not of the same quantity.
    """
    seen: dict[Path, Path] = {}
    for path in map(Path, paths):
        real = path.resolve()
        if real in seen:
            raise UserError(f"{path} is given twice{'' if path == seen[real] else f', the other time as {seen[real]}'}")
        seen[real] = path
    kinds = {path: "sweep" if _is_sweep(path) else "analysis" for path in seen.values()}
    if len(set(kinds.values())) > 1:
        one, other = (next(path for path, kind in kinds.items() if kind == wanted) for wanted in ("sweep", "analysis"))
        raise UserError(
            f"{one} is a sweep and {other} a single analysis: compare two sweeps, or the analysis with one of those under "
            f"{one / 'checkpoints'}"
        )
    names = _names(list(seen))
    sides: list[Side] = []
    for name, path in zip(names, seen.values(), strict=True):
        for found in _open_sweep(path) if kinds[path] == "sweep" else [_open_analysis(path)]:
            own = f"{name}: {found.name}" if found.name and found.name != name else name
            sides.append(replace(found, name=own))
    if len(sides) < 2:
        raise UserError("a comparison needs two folders or more: entropy-experiments compare A B --output FOLDER")
    if len(sides) > len(LETTERS):
        raise UserError(f"{len(sides)} sides are too many to read beside each other: compare at most {len(LETTERS)}")
    sides = [replace(side, letter=letter) for side, letter in zip(sides, LETTERS, strict=False)]
    _refuse_other_quantities(sides)
    return sides


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    names = [str(path) for path in paths]
    for length in range(max((len(path.parts) for path in paths), default=0), 0, -1):
        shorter = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(shorter)) < len(shorter):
            break
        names = shorter
    return [one_line(name, 60, "end") for name in names]


def _is_sweep(path: Path) -> bool:
    return (path / SWEEP_RECORD).is_file() or (path / "sweep_plan.json").is_file()


def _open_analysis(path: Path) -> Side:
    if path.is_dir() and not (path / "summary.json").exists():
        if (path / "trainer_state.json").is_file() or any(path.glob("checkpoint-*/trainer_state.json")):
            raise UserError(
                f"{path} holds checkpoints, not results: analyse it first with `entropy-experiments analyze`"
            )
    return Side("", "", path, "analysis", (read_results_folder(path),))


def _open_sweep(path: Path) -> list[Side]:
    """The sweep's runs, each with its finished analyses by step."""
    if not (path / SWEEP_RECORD).is_file():
        raise UserError(f"{path} is an unfinished sweep: finish it with `entropy-experiments sweep --resume`")
    entries = read_sweep(path).checkpoints
    sides = []
    for run in dict.fromkeys(entry.run for entry in entries):
        of_run = [entry for entry in entries if entry.run == run]
        points = [read_results_folder(_inside(path, entry.folder)) for entry in of_run if entry.status == "done"]
        if not points:
            raise UserError(
                f"{path} has no finished analysis of {one_line(run, 80)}: mend what failed, see {path / SWEEP_RECORD}, and "
                "resume it"
            )
        missing = [one_line(entry.name, 80) for entry in of_run if entry.status != "done"]
        said = f"Not in the comparison, because the sweep has no results of it: {', '.join(missing)}."
        points.sort(key=step_of)
        sides.append(Side("", one_line(run, 60), path, "sweep", tuple(points), (said,) if missing else ()))
    if len(sides) == 1:
        sides = [replace(sides[0], name="")]
    return sides


def _inside(path: Path, folder: str) -> Path:
    """`path`/`folder`. Raises UserError for a record that points elsewhere."""
    target = path / folder
    if path.resolve() not in target.resolve().parents:
        raise UserError(f"{path / SWEEP_RECORD} names {one_line(folder, 80)}, which is not inside the sweep")
    return target


def _refuse_other_quantities(sides: list[Side]) -> None:
    first = sides[0]
    for other in sides[1:]:
        drawn = [side.first.summary.rows_drawn for side in (first, other)]
        if drawn[0] != drawn[1]:
            given = other if drawn[0] else first
            raise UserError(
                f"{given.path} was analysed on given texts and the other folder on texts drawn from the policy: changes of "
                "entropy on given texts are another quantity and cannot be compared"
            )
        tokenizers = [side.first.summary.policy.tokenizer for side in (first, other)]
        if tokenizers[0] != tokenizers[1]:
            models = [side.first.summary.checkpoint.model for side in (first, other)]
            raise UserError(
                f"{first.path} and {other.path} have different tokenizers (models {_said(models)}): entropies per token are "
                "then different quantities and cannot be compared"
            )


def _said(values: Sequence[object]) -> str:
    return " and ".join(one_line(str(value), 80) for value in values)


def _base_model(point: ResultsFolder) -> str:
    """What the model is called; of a whole one, which is named by its own checkpoint, how large it is."""
    of = point.summary.checkpoint
    whole = Path(of.model) == Path(of.path)
    return f"a whole model of {point.summary.kernel_modules.trainable:,} trained parameters" if whole else of.model


def caveats(sides: Sequence[Side], points: Sequence[ResultsFolder]) -> list[str]:
    """What the reader must know besides the numbers; `points`: the analysis of each side that is compared."""
    found: list[str] = []

    def differing(values: list[Any]) -> str | None:
        if len({str(value) for value in values}) < 2:
            return None
        return ", ".join(f"{side.letter} {_shown(value)}" for side, value in zip(sides, values, strict=True))

    models = differing([_base_model(point) for point in points])
    if models:
        found.append(f"Different models with the same tokenizer: {models}.")
    configs = [point.summary.policy.sampling_config for point in points]
    for name, values in (
        ("temperature", [config.temperature for config in configs]),
        ("longest completion", [config.max_completion_length for config in configs]),
    ):
        if different := differing(values):
            found.append(
                f"Completions were sampled with another {name}: {different}. Each entropy is of its own sampling distribution, "
                "so part of a difference may be the sampling's."
            )
    steps = differing([step_of(point) for point in points])
    if steps:
        found.append(f"Checkpoints of different training steps: {steps}.")
    tasks = differing([point.summary.policy.task for point in points])
    if tasks:
        found.append(f"Different tasks: {tasks}.")
    clean = [point.summary.attribution.kernel_preconditioner == "none" for point in points]
    if any(clean) and not all(clean):
        plain_steps = ", ".join(side.letter for side, is_plain in zip(sides, clean, strict=True) if is_plain)
        found.append(f"The analysed step of {plain_steps} is a plain gradient step, that of the others AdamW's.")
    return found


def _shown(value: object) -> str:
    return plain(value) if as_number(value) is not None else one_line(str(value), 80)
