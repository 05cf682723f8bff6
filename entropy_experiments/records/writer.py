"""Writing the results folder of one analysis; entropy_experiments.records.reader reads it back.

config.yaml             resolved, replayable          sequences.parquet     both buffers, one row a sequence
run.json                versions, timings, checks     kernel.safetensors    kernels [eval, train] and [train, train]
summary.json            the numbers, the analyses     training_history.json the run's log up to the checkpoint
evaluation_set.json     what draws the evaluation buffer again
"""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from entropy_core.scores import TokenStatistics
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.checkpoints.readers.trained_state import LazyTensor
from entropy_experiments.checkpoints.safetensors_stream import write_tensors
from entropy_experiments.double_sampling import Buffers
from entropy_experiments.records.columns import SEQUENCES, schema_of
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.record import json_of
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import Summary
from entropy_experiments.step.numbers import AnalysisNumbers
from entropy_experiments.text.tokens import token_texts
from rl_training.files import write_json_whole, write_whole_by
from rl_training.sampling import Policy, Rollouts

_VERSIONS = ("entropy-experiments", "torch", "transformers", "peft", "accelerate", "numpy")


def write_summary(path: Path, summary: Summary) -> None:
    """summary.json."""
    write_json(path, json_of(summary))


def write_run(path: Path, content: Mapping[str, Any]) -> None:
    """run.json; what is not finite becomes null. Raises pydantic's ValidationError where this program made a mistake."""
    write_json(path, json_of(RunRecord.model_validate(finite(content))))


def write_history(path: Path, rows: Sequence[HistoryRow]) -> None:
    """training_history.json."""
    write_json(path, json_of(rows))


def write_json(path: Path, content: Any) -> None:
    """JSON without NaN or infinity (they become null), so that any reader takes it."""
    write_json_whole(path, finite(content))


def finite(content: Any) -> Any:
    """`content` with null in place of NaN and infinities, and lists in place of tuples."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_sequences(
    path: Path,
    buffers: Buffers,
    numbers: AnalysisNumbers,
    policy: Policy,
    token_shares: torch.Tensor | None = None,
    intervals: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Both buffers; row is the index on that kernel axis.

    Args:
        path: sequences.parquet.
        buffers: What is written.
        numbers: What was computed of them.
        policy: Whose completions they are.
        token_shares: (n_train, L) shares of the completion tokens, None where they were not computed.
        intervals: Column -> (n_train,) ends of intervals of shares and effects, where known.
    """
    step, training = numbers.step, buffers.training
    rows = _rows(buffers.evaluation, numbers.eval_statistics, policy, "evaluation")
    contributions = None if step is None else step.predictions.contributions
    for row, lost in zip(rows, _floats(contributions, len(rows)), strict=True):
        row["delta_h_lost"] = lost
    trained = _rows(training.rollouts, numbers.train_statistics, policy, "training")
    if token_shares is not None:
        for i, row in enumerate(trained):
            start = len(row["prompt_ids"])
            values = token_shares[i, start : start + len(row["completion_ids"])].tolist()
            row["token_shares"] = _of_drawn(values, row["completion_mask"])
    columns = (
        _floats(training.advantages, len(trained)),
        _floats(training.weights, len(trained)),
        _floats(None if step is None else step.attribution.shares, len(trained)),
        _floats(None if step is None else step.attribution.effects, len(trained)),
    )
    for row, advantage, weight, share, effect in zip(trained, *columns, strict=True):
        row.update(advantage=advantage, weight=weight, delta_h=share, effect_of_leaving_out=effect)
        row.update({name: float(ends[row["row"]]) for name, ends in (intervals or {}).items()})
        row["delta_h_horizon"] = None if share is None or step is None else share * step.attribution.horizon_factor
    table = pa.Table.from_pylist(rows + trained, schema=schema_of(SEQUENCES))
    write_whole_by(path, lambda part: pq.write_table(table, part))


def _floats(values: torch.Tensor | None, count: int) -> list[float | None]:
    return [None] * count if values is None else [float(v) for v in values]


def _rows(rollouts: Rollouts, statistics: TokenStatistics, policy: Policy, buffer: str) -> list[dict[str, Any]]:
    scores, sums = statistics.scores(), statistics.entropy_sums()
    endings, out = rollouts.endings(policy.sampling_config), []
    for i, sequence in enumerate(rollouts):
        prompt, tokens, drawn = list(sequence.prompt_ids), list(sequence.completion_ids), sequence.drawn
        span = slice(len(prompt), len(prompt) + len(tokens))  # from_sequences pads on the right
        out.append(
            {
                "buffer": buffer,
                "row": i,
                "prompt_index": sequence.prompt_index,
                "prompt": sequence.prompt,
                "completion": sequence.completion,
                "prompt_ids": prompt,
                "completion_ids": tokens,
                "token_texts": token_texts(policy.tokenizer, tokens),
                "completion_mask": None if drawn is None else list(drawn),
                "logprobs": _of_drawn(statistics.logprobs[i, span].tolist(), drawn),
                "entropies": _of_drawn(statistics.entropies[i, span].tolist(), drawn),
                "length": sequence.length,
                "truncated": endings[i] == "truncated",
                "ending": endings[i],
                "score": float(scores[i]),
                "entropy_sum": float(sums[i]),
                "reward": sequence.reward,
            }
        )
    return out


def _of_drawn(values: list[float], drawn: Sequence[bool] | None) -> list[float | None]:
    """Null where the policy did not draw the token: it is not scored."""
    return [value if own else None for value, own in zip(values, drawn or [True] * len(values), strict=True)]


def write_kernels(path: Path, numbers: AnalysisNumbers, checkpoint: Checkpoint, preconditioning: str) -> None:
    """The matrices that were computed, with what one must know to use them."""
    names = ("fisher", "entropy_fisher", "train_fisher", "train_entropy_fisher")
    if numbers.kernels is None:
        return
    tensors: dict[str, torch.Tensor] = {name: getattr(numbers.kernels, name) for name in names}
    rows = "Rao-Blackwell terms whose mean is the gradient of entropy per token"
    if not numbers.estimand.rows_drawn:
        rows = "fixed-prefix terms whose mean is the gradient of entropy per token on the given tokens"
    optimizer = checkpoint.optimizer
    metadata = {
        "axes": "[eval, train]; of train_fisher and train_entropy_fisher [train, train]",
        "fisher": "dS_eval^T diag(P) dS_train",
        "entropy_fisher": f"E_eval^T diag(P) dS_train; E: {rows}",
        "train_fisher": "dS_train^T diag(P) dS_train",
        "train_entropy_fisher": "E_train^T diag(P) dS_train; E: Rao-Blackwell terms",
        "preconditioner": "1"
        if preconditioning == "none"
        else f"1/(sqrt(v/(1-beta2^t))+eps), v of the {preconditioning}",
        "eps": "" if optimizer is None else str(next(iter(optimizer.values())).eps),
        "step": str(checkpoint.record.step),
        "sign": "delta h_i = +lr (1-beta1)/(1-beta1^t) c w_i mean_eval(entropy_fisher[:, i]), exact with the step's own P",
    }
    content = {k: v.contiguous().cpu().float() for k, v in tensors.items()}
    written = {k: LazyTensor(tuple(v.shape), v.dtype, k, partial(content.__getitem__, k)) for k, v in content.items()}
    write_tensors(path, written, metadata)


def describe_environment() -> dict[str, Any]:
    """Versions, git SHA of the working directory's checkout where there is one, and hardware."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        sha = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        sha = None
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "git_sha": sha,
        "hardware": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }
