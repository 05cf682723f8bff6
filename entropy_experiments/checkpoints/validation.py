"""Everything that can be known of a checkpoint before its weights are loaded: what `doctor` prints, and what `analyze` goes by.

Both call `examine_checkpoint`, so that they say the same. Each check raises a UserError of its own; here they are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from entropy_experiments.checkpoints.adapter_file import saved_factors
from entropy_experiments.checkpoints.eight_bit_moments import Converted, as_adamw, rounded_note
from entropy_experiments.checkpoints.exchanged_entries import exchange_refused, exchanged_factors
from entropy_experiments.checkpoints.folder import (
    Adapter,
    adapter_folders,
    checkpoint_step,
    find_adapter,
    missing_parts,
    read_json,
    read_trainer_state,
)
from entropy_experiments.checkpoints.imported import (
    MOMENTS_FILE,
    ImportRecord,
    check_imported_files,
    imported_optimizer,
    read_import_record,
)
from entropy_experiments.checkpoints.learning_rates import logged_rate, rates_after, rates_of_last_step
from entropy_experiments.checkpoints.loaded_policy import refuse_broken_premise
from entropy_experiments.checkpoints.missing_entries import missing_note, without_entry
from entropy_experiments.checkpoints.optimizer_names import match_names
from entropy_experiments.checkpoints.policy_outline import outline_policy
from rl_training.errors import UserError, first_line
from rl_training.models.source import is_on_the_hub
from rl_training.run.checkpoint_digests import check_digests, check_nothing_added, holds_numbers
from rl_training.run.optimizer_state import check_optimizer_state, read_tensor_file
from rl_training.run.rollouts import check_rollouts
from rl_training.run.sidecar import Sidecar, read_sidecar, refuse_special_file

_OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")


@dataclass
class Examined:
    """What was found. problems: what stops every analysis; optimizer_problems: what stops those that use Adam's moments;
    rate_problem: why these want checkpoint.learning_rate.

    outline: the policy on the meta device, None where it could not be built. names: per parameter group, in the order of the
    optimizer's ids. learning_rates: of the last step, by group; empty where unknown.
    """

    folder: Path
    sidecar: Sidecar | None = None
    imported: ImportRecord | None = None
    trainer_state: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    adapter: Adapter | None = None
    model_name: str = ""
    outline: nn.Module | None = None
    optimizer_state: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    names: list[list[str]] = field(default_factory=list)
    learning_rates: tuple[float, ...] = ()
    problems: list[str] = field(default_factory=list)
    optimizer_problems: list[str] = field(default_factory=list)
    rate_problem: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def optimizer_path(self) -> Path:
        """The file of the optimizer's moments."""
        return self.folder / ("optimizer.pt" if self.imported is None else MOMENTS_FILE)

    @property
    def recorded_names(self) -> list[list[str]] | None:
        """Names of the optimizer's entries by group, where a record of ours says them."""
        if self.imported is not None:
            return self.imported.names
        return None if self.sidecar is None else self.sidecar.optimizer_parameter_names

    @property
    def log_history(self) -> list[dict[str, Any]]:
        return list(self.trainer_state.get("log_history", []))

    def refuse(self, require_optimizer: bool) -> None:
        """Raises UserError with the first problem that stops an analysis."""
        stopping = list(self.problems)
        if require_optimizer:
            stopping += [*self.optimizer_problems, *([self.rate_problem] if self.rate_problem else [])]
        if stopping:
            raise UserError(stopping[0])


def examine_checkpoint(
    folder: Path,
    model_name: str | None = None,
    learning_rate: float | None = None,
    with_optimizer: bool = True,
    local_files_only: bool = False,
    read_weights: bool = False,
) -> Examined:
    """Look at every file that an analysis would open. Nothing is raised for a bad checkpoint: see `Examined`.

    model_name, learning_rate: what the user gives in place of the record's. with_optimizer: whether to open optimizer.pt.
    local_files_only: fetch no base model from the hub. read_weights: look for NaN in the checkpoint's weights, as loading does.
    """
    found = Examined(folder)
    fatal = found.problems

    def attempt(into: list[str], check: Callable[[], Any]) -> bool:
        try:
            check()
        except UserError as error:
            if str(error) not in into:
                into.append(str(error))
            return False
        return True

    if not attempt(fatal, lambda: _read_records(found)):
        return found
    for line in missing_parts(folder):
        (found.optimizer_problems if line.startswith("optimizer.pt") else fatal).append(f"{folder} lacks {line}")
    if fatal:
        return found
    recorded = {} if found.sidecar is None else found.sidecar.sha256
    weights = {n: d for n, d in recorded.items() if holds_numbers(n) and n not in _OPTIMIZER_FILES}
    attempt(fatal, lambda: check_nothing_added(folder, recorded))
    if attempt(fatal, lambda: check_digests(folder, weights)):
        attempt(fatal, lambda: _check_policy(found, model_name, local_files_only))
        if read_weights and not fatal:
            attempt(fatal, lambda: _check_finite(found))
    imported = found.imported
    if imported is not None:
        attempt(fatal, lambda: check_imported_files(folder, imported))
    if with_optimizer and found.optimizer_path.exists() and not (imported and fatal):
        states = {name: recorded[name] for name in recorded.keys() & set(_OPTIMIZER_FILES)}
        if attempt(found.optimizer_problems, lambda: check_digests(folder, states)):
            attempt(found.optimizer_problems, lambda: _check_optimizer(found))
    if found.sidecar is not None:
        attempt(fatal, lambda: _take_recorded_rates(found))
        # Last, since the checks above say what is wrong with such a file.
        others = {n: d for n, d in recorded.items() if not holds_numbers(n)}
        attempt(fatal, lambda: check_digests(folder, others))
        digest = found.sidecar.rollouts_sha256
        attempt(fatal, lambda: check_rollouts(folder.parent, found.step, digest))
    if learning_rate is not None or found.sidecar is None:
        unknown: list[str] = []
        attempt(unknown, lambda: _find_rates(found, learning_rate))
        found.rate_problem = unknown[0] if unknown and found.optimizer_state is not None else None
    return found


def _read_records(found: Examined) -> None:
    """The sidecar, the Trainer's state, the step, which adapter, which base model."""
    folder = found.folder
    for place in (folder, *adapter_folders(folder)):
        for path in sorted(place.iterdir()):
            refuse_special_file(path)
    found.sidecar = read_sidecar(folder)
    found.imported = read_import_record(folder)
    found.trainer_state = read_trainer_state(folder)
    found.step = checkpoint_step(folder)
    found.adapter = find_adapter(folder, found.sidecar)
    if found.sidecar is not None:
        refuse_broken_premise(folder, found.sidecar)
    if found.sidecar is not None and found.sidecar.quantization is not None:
        raise UserError(
            f"{folder} was trained quantised ({found.sidecar.quantization}); loaded without, it is another policy. Quantised "
            "checkpoints cannot be analysed: train on a base model that is not quantised (dequantize() of transformers makes one)"
        )


def _check_policy(found: Examined, model_name: str | None, local_files_only: bool) -> None:
    folder, adapter, sidecar = found.folder, found.adapter, found.sidecar
    if adapter is None:
        found.model_name = model_name or str(folder)
    else:
        recorded = sidecar.model_name if sidecar is not None else None
        found.model_name = model_name or recorded or _named_in(adapter)
    reproducible = sidecar is not None and sidecar.witness is not None
    try:
        found.outline = outline_policy(folder, found.model_name, adapter, reproducible, local_files_only)
    except UserError as error:
        if local_files_only and adapter is not None and is_on_the_hub(found.model_name):
            found.notes.append(f"{found.model_name} is not on this machine: it was not looked at, and will be fetched")
            return
        if adapter is None or str(folder) in str(error):
            raise
        raise UserError(
            f"the base model of {folder} does not load: {error}; name another with checkpoint.model=..."
        ) from error
    if sidecar is not None:
        _check_token_ids(folder, sidecar, vocabulary_size(found.outline))
    if (folder / "tokenizer_config.json").exists():
        from rl_training.models.load import read_tokenizer

        read_tokenizer(folder)
    elif adapter is None:
        _tokenizer_of(found.model_name)


def vocabulary_size(outline: nn.Module | None) -> int | None:
    """Rows of the policy's embeddings; None where its base model was not looked at."""
    get: Any = getattr(outline, "get_input_embeddings", None)
    return None if get is None else int(get().weight.shape[0])


def _check_token_ids(folder: Path, sidecar: Sidecar, vocabulary: int | None) -> None:
    """Raises UserError for recorded end or padding tokens that the policy does not have."""
    s = sidecar.sampling
    beyond = [t for t in (*s.eos_token_ids, s.pad_token_id) if vocabulary is not None and t >= vocabulary]
    if beyond:
        raise UserError(
            f"the record of {folder} names the token {beyond[0]} for the end or padding, its base model has {vocabulary}: the "
            "record is damaged, or of another model's run; copy entropy_experiments.json again, or name the run's base model "
            "with checkpoint.model=..."
        )


def _tokenizer_of(name: str) -> None:
    """Raises UserError where a whole model has no tokenizer beside it."""
    folder = Path(name)
    if folder.is_dir() and not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer_config.json): copy the base model's into it, or save it by "
            "tokenizer.save_pretrained"
        )


def _named_in(adapter: Adapter) -> str:
    content = read_json(adapter.folder / "adapter_config.json")
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter.folder}/adapter_config.json names no base model: give checkpoint.model=...")
    return name


def _check_finite(found: Examined) -> None:
    """Raises UserError where a weight of the checkpoint is not finite."""
    place = found.folder if found.adapter is None else found.adapter.folder
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if not bool(torch.isfinite(file.get_tensor(name)).all()):
                        raise UserError(
                            f"{path}: parameter {name!r} holds NaN or infinite values; the run diverged before this step"
                        )
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}): copy it again") from error


def _check_optimizer(found: Examined) -> None:
    path, sidecar = found.optimizer_path, found.sidecar
    if found.imported is not None:
        read = Converted(imported_optimizer(found.folder, found.imported), rounded=found.imported.quantised)
        found.scheduler = found.imported.scheduler
    else:
        read = as_adamw(path, read_tensor_file(path))
        scheduler = found.folder / "scheduler.pt"
        found.scheduler = read_tensor_file(scheduler) if scheduler.exists() else None
        if not isinstance(found.scheduler, dict | None):
            raise UserError(f"{scheduler} is no state of a schedule: it is damaged; copy it again")
    state = read.state
    if read.rounded:
        found.notes.append(rounded_note(state))
    steps = _steps_seen(found)
    trusted = sidecar is not None and "optimizer.pt" in sidecar.sha256
    optimizer_class = None if sidecar is None or read.converted else sidecar.optimizer_class
    check_optimizer_state(path, state, steps, optimizer_class, trusted, read.rounded)
    if found.outline is not None:
        found.names = match_names(found.outline, state, found.recorded_names)
        _check_entries(found, state, trusted)
    found.optimizer_state = state


def _check_entries(found: Examined, state: dict[str, Any], trusted: bool) -> None:
    """Entries that are missing are noted; those of LoRA's factors that changed places are refused, unless the digest fits."""
    missing = without_entry(state["state"], found.names, [group["params"] for group in state["param_groups"]])
    if missing and not trusted:
        found.notes.append(missing_note(missing))
    if found.adapter is None or trusted:
        return
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    entries = dict(zip([name for group in found.names for name in group], numbers, strict=True))
    factors = saved_factors(found.adapter.folder, found.adapter.name, entries.keys() - set(missing))
    pair = exchanged_factors(factors, lambda name: _moments(state["state"][entries[name]]))
    if pair is not None:
        raise exchange_refused(str(found.optimizer_path), pair)


def _moments(entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return entry["exp_avg"], entry["exp_avg_sq"]


def _steps_seen(found: Examined) -> Sequence[int]:
    """Counts that the optimizer may hold: a loss scaler skips steps of the optimizer and of the scheduler alike."""
    if not found.trainer_state and found.sidecar is None:
        return ()
    steps = [found.step]
    scaled = (found.folder / "scaler.pt").exists() or found.imported is not None
    if scaled and isinstance(found.scheduler, dict):
        steps.append(int(found.scheduler.get("last_epoch", found.step)))
    return steps


def _take_recorded_rates(found: Examined) -> None:
    assert found.sidecar is not None
    rates = found.sidecar.learning_rates_used
    groups = len(found.sidecar.optimizer_parameter_names)
    if len(rates) != groups or not all(0 <= rate < float("inf") for rate in rates):
        raise UserError(
            f"the record of {found.folder} has learning rates {rates} for {groups} parameter groups: it is damaged; copy the "
            "checkpoint again"
        )
    found.learning_rates = tuple(rates)


def _find_rates(found: Examined, learning_rate: float | None) -> None:
    """The rates of the step that is analysed: the user's, or those of the last step."""
    state = found.optimizer_state
    groups = [] if state is None else state["param_groups"]
    if learning_rate is not None:
        if found.learning_rates and found.learning_rates[0]:
            factor = learning_rate / found.learning_rates[0]
            found.learning_rates = tuple(rate * factor for rate in found.learning_rates)
        else:
            found.learning_rates = tuple(rates_after(groups, learning_rate, found.scheduler)) or (learning_rate,)
        return
    if not groups:
        logged = logged_rate(found.step, found.log_history)
        found.learning_rates = () if logged is None else (logged,)
        return
    longest = found.trainer_state.get("max_steps")
    longest = longest if isinstance(longest, int) else None
    found.learning_rates = tuple(rates_of_last_step(found.step, found.log_history, groups, found.scheduler, longest))
