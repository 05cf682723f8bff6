"""Reading the results folder of one analysis: what must be there, is, or one line says what is not.

    run.json  summary.json  training_history.json  sequences.parquet  kernel.safetensors

``kernel.safetensors`` may be absent where the summary has no kernel section (an analysis that was told not
to compute it). Nothing here loads torch: a report can be written on any machine.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.record import REMEDY, validated
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import RESULTS_FORMAT, Summary
from entropy_experiments.statistics.paired_differences import agreements_of_folder
from rl_training.errors import UserError

_REQUIRED_COLUMNS = (
    "buffer",
    "row",
    "prompt_index",
    "prompt",
    "completion",
    "length",
    "reward",
    "advantage",
    "delta_h",
)
_OPTIONAL_COLUMNS = (
    "truncated",
    "score",
    "entropy_sum",
    "weight",
    "delta_h_horizon",
    "delta_h_lost",
    "effect_of_leaving_out",
)
# One entry a completion token. Folders of format 1 have neither token_texts nor token_shares.
_TOKEN_COLUMNS = ("token_texts", "token_shares", "logprobs", "entropies")
_KERNELS = ("fisher", "entropy_fisher")
_TRAIN_KERNELS = ("train_fisher", "train_entropy_fisher")


@dataclass(frozen=True)
class ResultsFolder:
    """The content of one results folder.

    ``evaluation`` and ``training`` are the rows of sequences.parquet in the order of the kernel's axes; of the
    per-token columns, those that the folder's format has (``token_texts``, ``token_shares``, ``logprobs``,
    ``entropies``: lists, one entry a completion token, or None). ``kernels`` maps "fisher" and "entropy_fisher"
    to (n_eval, n_train) float arrays, "train_fisher" and "train_entropy_fisher" to (n_train, n_train) ones; what
    was not computed is absent. ``summary``, ``run`` and ``history`` are the typed records of the JSON files (docs/guides/
    results-format.md); ``raw...`` the same as plain data, until every reader takes the records.
    """

    path: Path
    raw_run: dict[str, Any]
    raw: dict[str, Any]
    raw_history: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    training: list[dict[str, Any]]
    kernels: dict[str, np.ndarray]

    @cached_property
    def summary(self) -> Summary:
        """summary.json. Raises UserError naming the first field that is not of this format."""
        return validated(Summary, self.raw, self.path / "summary.json")

    @cached_property
    def run(self) -> RunRecord:
        """run.json. Raises UserError naming the first field that is not of this format."""
        return validated(RunRecord, self.raw_run, self.path / "run.json")

    @cached_property
    def history(self) -> list[HistoryRow]:
        """training_history.json. Raises UserError naming the first field that is not of this format."""
        return validated(list[HistoryRow], self.raw_history, self.path / "training_history.json")


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}): {REMEDY}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): {REMEDY}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{path} is not valid JSON ({_first_line(error)}): {REMEDY}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a results file: {REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if not isinstance(content, kind):
        wanted = "an object" if kind is dict else "a list"
        raise UserError(f"{path} holds {type(content).__name__} where {wanted} was expected: {REMEDY}")
    return content


def _read_sequences(path: Path) -> list[dict[str, Any]]:
    try:
        names = pq.read_schema(path).names
        missing = [name for name in _REQUIRED_COLUMNS if name not in names]
        if missing:
            raise UserError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {REMEDY}")
        wanted = [name for name in _REQUIRED_COLUMNS + _OPTIONAL_COLUMNS + _TOKEN_COLUMNS if name in names]
        return pq.read_table(path, columns=wanted).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file ({_first_line(error)}): {REMEDY}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


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
        raise UserError(f"{path} is not a readable safetensors file ({_first_line(error)}): {REMEDY}") from error
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


def _refuse_other_formats(path: Path, summary: dict[str, Any]) -> None:
    version = summary.get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{path}: format_version is {str(version)[:40]!r}, not a whole number from 1: {REMEDY}")
    if version > RESULTS_FORMAT:
        raise UserError(
            f"{path} has results format {version}, and this version of entropy-experiments reads up to {RESULTS_FORMAT}: upgrade "
            "entropy-experiments, or analyse the checkpoint again with this version"
        )


def read_results_folder(path: Path | str, unfinished: bool = False) -> ResultsFolder:
    """Read and check the results folder at ``path``; one still being written only where ``unfinished`` is set.

    Raises
    ------
    rl_training.errors.UserError: no such folder, an unfinished one (``….part``), a missing or broken file,
        or files that contradict each other.
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
    summary = _read_json(path / "summary.json", dict)
    _refuse_other_formats(path / "summary.json", summary)
    if "agreement" not in summary:  # folders written before it was decided by the error of the difference
        summary["agreement"] = agreements_of_folder(path, summary)
    run = _read_json(path / "run.json", dict)
    history = _read_json(path / "training_history.json", list)
    if not all(isinstance(entry, dict) for entry in history):
        raise UserError(f"{path / 'training_history.json'} must be a list of objects, one a training step: {REMEDY}")
    sequences = path / "sequences.parquet"
    rows = _read_sequences(sequences)
    evaluation, training = _buffer(sequences, rows, "evaluation"), _buffer(sequences, rows, "training")
    kernel_path = path / "kernel.safetensors"
    kernels: dict[str, np.ndarray] = {}
    if kernel_path.is_file():
        kernels = _read_kernels(kernel_path, len(evaluation), len(training))
    elif summary.get("kernel"):
        raise UserError(f"{path} is incomplete, kernel.safetensors is missing: {REMEDY}")
    return ResultsFolder(path, run, summary, history, evaluation, training, kernels)
