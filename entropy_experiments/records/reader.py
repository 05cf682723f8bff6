"""Reading the results folder of one analysis: what must be there, is, or one line says what is not.

    run.json  summary.json  training_history.json  sequences.parquet  kernel.safetensors

``kernel.safetensors`` may be absent where the summary has no kernel section (an analysis that was told not
to compute it). Nothing here loads torch: a report can be written on any machine.
"""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropy_experiments.records.contradictions import contradiction
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.record import REMEDY, json_of, validated
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import RESULTS_FORMAT, Summary
from rl_training.errors import UserError, first_line
from rl_training.run.sums import SUMS_NAME, check_sums

_COLUMNS = (
    "buffer",
    "row",
    "prompt_index",
    "prompt",
    "completion",
    "length",
    "truncated",
    "reward",
    "advantage",
    "weight",
    "score",
    "entropy_sum",
    "delta_h",
    "delta_h_horizon",
    "delta_h_lost",
    "effect_of_leaving_out",
    "token_texts",
    "token_shares",
    "logprobs",
    "entropies",
)
"""Of sequences.parquet, those that readers use. The last four have one entry a completion token."""
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

    @cached_property
    def raw(self) -> dict[str, Any]:
        """`summary` as plain data, for readers that do not take the record yet."""
        return json_of(self.summary)

    @cached_property
    def raw_run(self) -> dict[str, Any]:
        """`run` as plain data, for readers that do not take the record yet."""
        return json_of(self.run)

    @cached_property
    def raw_history(self) -> list[dict[str, Any]]:
        """`history` as plain data, for readers that do not take the record yet."""
        return json_of(self.history)


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
        raise UserError(f"{path} is not valid JSON ({first_line(error)[:200]}): {REMEDY}") from error
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
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise UserError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {REMEDY}")
        return pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
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


def _refuse_other_formats(path: Path, summary: dict[str, Any]) -> None:
    version = summary.get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{path}: format_version is {str(version)[:40]!r}, not a whole number from 1: {REMEDY}")
    if version > RESULTS_FORMAT:
        raise UserError(
            f"{path} has results format {version}, and this version of entropy-experiments reads {RESULTS_FORMAT}: upgrade "
            "entropy-experiments, or analyse the checkpoint again with this version"
        )
    if version < RESULTS_FORMAT:
        raise UserError(f"{path} is of an older version of entropy-experiments (results format {version}): {REMEDY}")


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
    content = _read_json(path / "summary.json", dict)
    _refuse_other_formats(path / "summary.json", content)
    summary = validated(Summary, content, path / "summary.json")
    run = validated(RunRecord, _read_json(path / "run.json", dict), path / "run.json")
    history_path = path / "training_history.json"
    history = validated(list[HistoryRow], _read_json(history_path, list), history_path)
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
