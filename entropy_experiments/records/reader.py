"""Reading the results folder of one analysis: what must be there, is, or one line says what is not.

    run.json  summary.json  training_history.json  sequences.parquet  kernel.safetensors

``kernel.safetensors`` may be absent where the summary has no kernel section (an analysis that was told not
to compute it). Nothing here loads torch: a report can be written on any machine.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropy_experiments.records.columns import SEQUENCES
from entropy_experiments.records.contradictions import contradiction
from entropy_experiments.records.files import read_record
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.record import REMEDY
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import RESULTS_FORMAT, Summary
from rl_training.errors import UserError, first_line
from rl_training.run.sums import SUMS_NAME, check_sums

_TOKENS, _ENDS = {"prompt_ids", "completion_ids", "completion_mask", "ending"}, ("_low", "_high")
_COLUMNS = [c.name for c in SEQUENCES if c.name not in _TOKENS and not c.name.endswith(_ENDS)]
"""Of sequences.parquet, those that readers need."""
_INTERVALS = [c.name for c in SEQUENCES if c.name.endswith(_ENDS)]
"""Those that older folders lack."""
_KERNELS = ("fisher", "entropy_fisher")
_TRAIN_KERNELS = ("train_fisher", "train_entropy_fisher")


@dataclass(frozen=True)
class ResultsFolder:
    """The content of one results folder.

    ``summary``, ``run`` and ``history`` are the records of the JSON files (docs/guides/results-format.md). ``evaluation`` and
    ``training`` are the rows of sequences.parquet in the order of the kernel's axes. ``kernels`` maps "fisher" and
    "entropy_fisher" to (n_eval, n_train) float arrays, "train_fisher" and "train_entropy_fisher" to (n_train, n_train) ones;
    what was not computed is absent.
    """

    path: Path
    run: RunRecord
    summary: Summary
    history: list[HistoryRow]
    evaluation: list[dict[str, Any]]
    training: list[dict[str, Any]]
    kernels: dict[str, np.ndarray]


def _read_sequences(path: Path) -> list[dict[str, Any]]:
    try:
        names = pq.read_schema(path).names
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise UserError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {REMEDY}")
        return pq.read_table(path, columns=_COLUMNS + [name for name in _INTERVALS if name in names]).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)[:200]}): {REMEDY}") from error


def _buffer(path: Path, rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of one buffer, ordered as the kernel's axis; refuses text, order or numbers that cannot be
    used.
    """
    members = [row for row in rows if row["buffer"] == name]
    for row in members:
        if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
            raise UserError(f"{path}: a sequence of the {name} buffer has no prompt or completion text: {REMEDY}")
        if not isinstance(row["row"], int) or not isinstance(row["prompt_index"], int):
            raise UserError(f"{path}: row and prompt_index of the {name} buffer must be whole numbers: {REMEDY}")
    members.sort(key=lambda row: row["row"])
    if [row["row"] for row in members] != list(range(len(members))):
        raise UserError(f"{path}: the rows of the {name} buffer are not numbered 0 … {len(members) - 1}: {REMEDY}")
    return members


def _read_kernels(path: Path, n_eval: int, n_train: int) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({first_line(error)[:200]}): {REMEDY}") from error
    kernels = {name: tensors[name] for name in _KERNELS + _TRAIN_KERNELS if name in tensors}
    if not kernels.keys() & set(_KERNELS):
        raise UserError(f"{path} holds neither {' nor '.join(_KERNELS)}: {REMEDY}")
    for name, kernel in kernels.items():
        if kernel.shape != ((n_train if name in _TRAIN_KERNELS else n_eval), n_train):
            raise UserError(
                f"{path}: {name} has shape {kernel.shape}, but sequences.parquet has {n_eval} evaluation and "
                f"{n_train} training sequences: the files are of different analyses; {REMEDY}"
            )
    return kernels


def read_results_folder(path: Path | str, unfinished: bool = False) -> ResultsFolder:
    """Read and check a results folder.

    Args:
        path: The folder.
        unfinished: Whether one that is still being written (``....part``) may be read.

    Returns:
        Its whole content, every field of it validated.

    Raises:
        UserError: No such folder, an unfinished one, a missing or broken file, a field that is not of this format, another
            format, files that contradict each other, or one that differs from its digest in SHA256SUMS.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"no results folder at {path}: give the folder that `entropy-experiments analyze` wrote")
    if path.name.endswith(".part") and not unfinished:
        raise UserError(f"{path} is an unfinished analysis, perhaps one that was killed: {REMEDY}")
    needed = ["summary.json", "run.json", "sequences.parquet", "training_history.json"]
    missing = [name for name in needed if not (path / name).is_file()]
    if len(missing) == len(needed):
        raise UserError(f"{path} is not the results folder of an analysis: it has none of {', '.join(needed)}")
    if missing:
        raise UserError(f"{path} is incomplete, {', '.join(missing)} is missing: {REMEDY}")
    summary = read_record(path / "summary.json", Summary, version=RESULTS_FORMAT)
    run = read_record(path / "run.json", RunRecord)
    history = read_record(path / "training_history.json", list[HistoryRow])
    sequences = path / "sequences.parquet"
    rows = _read_sequences(sequences)
    evaluation, training = _buffer(sequences, rows, "evaluation"), _buffer(sequences, rows, "training")
    wrong = contradiction(summary, len(evaluation), len(training))
    if wrong is not None:
        raise UserError(f"{path / 'summary.json'}: {wrong}: the files are of different analyses; {REMEDY}")
    kernel_path = path / "kernel.safetensors"
    kernels: dict[str, np.ndarray] = {}
    if kernel_path.is_file():
        kernels = _read_kernels(kernel_path, len(evaluation), len(training))
    elif summary.kernel is not None:
        raise UserError(f"{path} is incomplete, kernel.safetensors is missing: {REMEDY}")
    if not check_sums(path, REMEDY):
        warnings.warn(
            f"{path} has no {SUMS_NAME}: whether its files are as they were written is not known", stacklevel=2
        )
    return ResultsFolder(path, run, summary, history, evaluation, training, kernels)
