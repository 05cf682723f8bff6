"""What the Hugging Face Trainer writes into a checkpoint beside weights and optimizer: its state, its schedule, random states.

Each is checked before the Trainer reads it, which would take much of it as it is. The validators take what was read, not paths
alone, so that another reader of the same content can call them; `path` is for the message.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from rl_training.errors import UserError
from rl_training.files import read_regular
from rl_training.run.record_ranges import LARGEST_LEARNING_RATE

_AGAIN = "it is damaged; copy it again"
_TWISTER, _PYTHON_WORDS, _NUMPY_WORDS = "MT19937", 625, 624


def read_trainer_state_file(path: Path) -> dict[str, Any]:
    """`trainer_state.json`. Raises UserError for a file that is no state of a Trainer."""
    try:
        state = json.loads(read_regular(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({type(error).__name__}): {_AGAIN}") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if type(step) is not int or not 0 <= step <= 10**9:
        raise UserError(f"{path} names no global_step: {_AGAIN}")
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise UserError(f"{path}: log_history is no list of rows: {_AGAIN}")
    return state


def check_resumable_state(path: Path, state: Mapping[str, Any], step: int) -> None:
    """Raises UserError for a state that a Trainer cannot go on from, or of another step."""
    if state["global_step"] != step:
        raise UserError(
            f"{path} is of step {state['global_step']}, the checkpoint's record of step {step}: files of two checkpoints are "
            "mixed; copy the checkpoint again"
        )
    unknown = state.keys() - {field.name for field in dataclasses.fields(TrainerState)}
    if unknown:
        raise UserError(
            f"{path} holds {sorted(unknown)[0][:40]!r}, which the Trainer of this release does not know: {_AGAIN}"
        )
    epoch, callbacks = state.get("epoch", 0), state.get("stateful_callbacks", {})
    if epoch is not None and not (_is_number(epoch) and epoch >= 0):
        raise UserError(f"{path}: epoch {str(epoch)[:40]} is no number of passes over the data: {_AGAIN}")
    counts = ("max_steps", "logging_steps", "eval_steps", "save_steps", "num_train_epochs", "num_input_tokens_seen")
    odd = next((name for name in counts if name in state and not _is_number(state[name])), None)
    if odd is not None or not isinstance(callbacks, dict):
        raise UserError(f"{path}: {odd or 'stateful_callbacks'} is of another type than a Trainer writes: {_AGAIN}")


def check_schedule(path: Path, state: Any, steps: Sequence[int], groups: int | None) -> None:
    """Raises UserError unless `state` is that of a schedule of torch.

    Args:
        steps: Counts that it may have reached; empty where nothing says.
        groups: Parameter groups of the optimizer; None where that is not known.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} is no state of a schedule: {_AGAIN}")
    reached = state.get("last_epoch")
    if reached is not None and (type(reached) is not int or reached < 0 or (steps and reached not in steps)):
        raise UserError(
            f"{path} has reached step {str(reached)[:40]}, the checkpoint {steps[0] if steps else '?'}: {_AGAIN}"
        )
    for name in ("base_lrs", "_last_lr"):
        rates = state.get(name)
        if rates is None:
            continue
        whole = isinstance(rates, list) and all(_is_rate(rate) for rate in rates)
        if not whole or (groups is not None and len(rates) != groups):
            raise UserError(f"{path}: {name} holds no learning rate for each parameter group: {_AGAIN}")


def check_random_state(path: Path, state: Any) -> None:
    """Raises UserError unless `state` is what the Trainer keeps of the generators of Python, numpy and torch."""
    where = f"{path} holds no random state of"
    python, numpy, cpu = (state.get(name) if isinstance(state, dict) else None for name in ("python", "numpy", "cpu"))
    if not (isinstance(python, tuple) and len(python) == 3 and python[0] == 3 and _are_words(python[1], _PYTHON_WORDS)):
        raise UserError(f"{where} Python: {_AGAIN}")
    if not 0 <= python[1][-1] <= _PYTHON_WORDS - 1 or not (python[2] is None or _is_number(python[2])):
        raise UserError(f"{where} Python: {_AGAIN}")
    if not (isinstance(numpy, tuple) and len(numpy) == 5 and numpy[0] == _TWISTER):
        raise UserError(f"{where} numpy: {_AGAIN}")
    words, place, has_gauss, gauss = numpy[1:]
    if getattr(words, "shape", None) != (_NUMPY_WORDS,) or str(words.dtype) != "uint32" or not _is_number(gauss):
        raise UserError(f"{where} numpy: {_AGAIN}")
    if type(place) is not int or not 0 <= place <= _NUMPY_WORDS or has_gauss not in (0, 1):
        raise UserError(f"{where} numpy: {_AGAIN}")
    if not isinstance(cpu, torch.Tensor) or cpu.dtype != torch.uint8 or cpu.device.type != "cpu":
        raise UserError(f"{where} torch: {_AGAIN}")
    try:
        torch.Generator().set_state(cpu)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{where} torch: {_AGAIN}") from error


def check_entries_fit(path: Path, optimizer: torch.optim.Optimizer, remedy: str) -> None:
    """Raises UserError where a loaded entry has another shape than its parameter, or is not finite."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor) or name == "step":
                    continue
                if value.shape != parameter.shape:
                    raise UserError(
                        f"{path}: {name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}: "
                        f"the file is damaged, or of another model; {remedy}"
                    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    return _is_number(value) and 0 <= float(value) <= LARGEST_LEARNING_RATE


def _are_words(words: Any, count: int) -> bool:
    return isinstance(words, tuple) and len(words) == count and all(type(w) is int and 0 <= w < 1 << 32 for w in words)
