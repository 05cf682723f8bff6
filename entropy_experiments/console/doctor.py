"""What is in a checkpoint, what can be analysed from it, and what is missing and how to get it.

It opens every file that `analyze` would open, by the same checks (entropy_experiments.checkpoints.validation), and
loads no model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from entropy_experiments.buffers.recorded_sampling import (
    recorded_rendering,
    refuse_another_distribution,
    refuse_other_prompts,
    sampling_in_words,
)
from entropy_experiments.buffers.recorded_task import task_of_analysis
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.checkpoints.folder import CheckpointRecord, adapter_folders, read_json, resolve_checkpoint
from entropy_experiments.checkpoints.foreign import foreign_layout
from entropy_experiments.checkpoints.loaded_policy import check_witness
from entropy_experiments.checkpoints.validation import Examined, examine_checkpoint, vocabulary_size
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console.describe_source import describe, importable
from rl_training.config import BUILT_IN_REWARDS, TaskConfig
from rl_training.errors import UserError
from rl_training.models.load import read_tokenizer
from rl_training.prompts.chat_prompts import tokenize_prompts
from rl_training.run.folder_lock import in_use_by
from rl_training.run.rollouts import rollouts_path
from rl_training.run.sidecar import Sidecar
from rl_training.sampling import SamplingConfig
from rl_training.tasks.task import load_task

YES = "yes"
WITHOUT_ADAM = "without Adam"
AFTER_IMPORT = "after import"
NO = "no"
_TO_GIVE = "checkpoint.task, sampling.temperature and sampling.max_completion_length"


@dataclass(frozen=True)
class Diagnosis:
    """One checkpoint. kind: what it is, in a few words. verdict: YES, WITHOUT_ADAM (preconditioning=none only) or NO.
    remedies: what to do, one line each; give: settings that an analysis must be given.
    """

    found: Examined
    kind: str
    verdict: str
    remedies: list[str]
    give: list[str]

    @property
    def healthy(self) -> bool:
        """Whether nothing is missing."""
        return self.verdict == YES and not self.remedies


def diagnose(path: str | Path, trust: bool = False) -> Diagnosis:
    """Examine a checkpoint, or the latest one of a run. trust: as in the analysis.

    Raises UserError where the path holds no checkpoint at all.
    """
    folder = resolve_checkpoint(path)
    found = examine_checkpoint(folder, local_files_only=True, read_weights=True)
    if found.sidecar is not None and not found.problems:
        try:
            checkpoint = _check_sampling(found, found.sidecar)
            check_witness(found.folder, found.sidecar, vocabulary_size(found.outline))
            if found.sidecar.task is not None:
                task = task_of_analysis(found.sidecar, FisherAnalysisConfig(), trust)
                _check_task(checkpoint, task)
        except UserError as error:
            found.problems.append(str(error))
    give = [_TO_GIVE] if found.sidecar is None else ["checkpoint.task"] if found.sidecar.task is None else []
    remedies = [*found.problems, *found.optimizer_problems]
    if found.problems:
        return Diagnosis(found, _kind(found), NO, remedies, [])
    if found.optimizer_problems:
        give += [] if found.learning_rates else ["checkpoint.learning_rate"]
        return Diagnosis(found, _kind(found), WITHOUT_ADAM, remedies, give)
    if found.rate_problem is not None:
        give.append("checkpoint.learning_rate")
        remedies.append(found.rate_problem)
    return Diagnosis(found, _kind(found), YES, remedies, give)


def _check_task(checkpoint: Checkpoint, config: TaskConfig | None) -> None:
    """Raises UserError where a built-in task cannot be made, or its prompts are not those that the run recorded.

    A file or a function of one's own is left alone: it would be opened or imported.
    """
    if config is None or config.source != "reasoning_gym" or config.reward not in BUILT_IN_REWARDS:
        return
    task, sidecar = load_task(config), checkpoint.record.sidecar
    if checkpoint.tokenizer is None or sidecar is None:
        return
    s = sidecar.sampling
    sampling_config = SamplingConfig(
        s.temperature, s.max_completion_length, tuple(s.eos_token_ids), s.pad_token_id,
        rendering=recorded_rendering(s),
    )  # fmt: skip
    tokenize_prompts(checkpoint.tokenizer, [task.train[0]["prompt"]], sampling_config.rendering)
    refuse_other_prompts(checkpoint, sampling_config, task)


def _check_sampling(found: Examined, sidecar: Sidecar) -> Checkpoint:
    """The checkpoint without its weights. Raises UserError where an analysis would refuse the recorded sampling; a template is
    compared where the folder holds one.
    """
    s, folder = sidecar.sampling, found.folder
    SamplingConfig(s.temperature, s.max_completion_length, tuple(s.eos_token_ids), s.pad_token_id, s.top_k, s.top_p)
    tokenizer = read_tokenizer(folder) if (folder / "tokenizer_config.json").exists() else None
    if tokenizer is None or tokenizer.chat_template is None:
        sidecar = sidecar.model_copy(update={"sampling": s.model_copy(update={"chat_template_sha256": None})})
    record = CheckpointRecord(folder, found.step, found.model_name, sidecar, found.log_history)
    checkpoint = Checkpoint(found.outline or nn.Module(), None, None, tokenizer, record)
    refuse_another_distribution(checkpoint)
    return checkpoint


def _kind(found: Examined) -> str:
    """Who wrote it, and what of a policy it holds."""
    foreign = foreign_layout(found.folder)
    if foreign is not None:
        return foreign.name
    if found.sidecar is not None:
        maker = "this project"
    elif found.imported is not None:
        maker = f"imported from {found.imported.layout}"
    elif (found.folder / "trainer_state.json").exists():
        maker = "plain TRL"
    else:
        maker = "saved model"
    if found.adapter is None and not adapter_folders(found.folder):
        return f"{maker}, whole model"
    try:
        content = {} if found.adapter is None else read_json(found.adapter.folder / "adapter_config.json")
    except UserError:
        return f"{maker}, adapter"
    content = content if isinstance(content, dict) else {}
    kind = "DoRA" if content.get("use_dora") else str(content.get("peft_type", "adapter")).replace("LORA", "LoRA")
    named = "" if found.adapter is None or found.adapter.name == "default" else f" named {found.adapter.name}"
    return f"{maker}, {kind}{named}"


def examine(path: str | Path, trust: bool = False) -> tuple[list[str], bool]:
    """Lines for a person, and whether a full analysis can run. Loads no model, opens and imports nothing that the record names.

    Raises UserError where the path holds no checkpoint at all.
    """
    running = in_use_by(Path(path)) if Path(path).is_dir() else None
    try:
        diagnosis = diagnose(path, trust)
    except UserError as error:
        if running is None:
            raise
        raise UserError(f"{path} is being written by {running}, and has no whole checkpoint yet ({error})") from error
    found = diagnosis.found
    lines = [f"checkpoint {found.folder}", f"  {diagnosis.kind}"]
    if (running := running or in_use_by(found.folder.parent)) is not None:
        lines.append(f"  the run is under way: {running} writes into its folder, and more checkpoints may come")
    if found.trainer_state:
        lines.append(f"  step {found.step} of {found.trainer_state.get('max_steps', '?')}")
    if found.adapter is not None and found.model_name:
        lines.append(f"  base model: {found.model_name}")
    if found.imported is not None:
        how = "named in its files" if found.imported.named_by == "files" else "named by the model's order"
        give = f"; give {_TO_GIVE}" if found.sidecar is None else ""
        lines.append(f"  imported from {found.imported.source}; optimizer entries {how}, and verified{give}")
    elif found.sidecar is None:
        lines.append(
            "  no sidecar: not written by this project's trainer. Optimizer names are rebuilt and verified; give "
            f"{_TO_GIVE} in the analysis configuration"
        )
    else:
        lines += _recorded(found.sidecar, found.folder)
        if found.sidecar.task is None:
            lines.append("  task: not recorded; give checkpoint.task in the analysis configuration")
    if found.learning_rates:
        groups = "" if len(found.learning_rates) == 1 else ", one a parameter group"
        lines.append(f"  learning rate of its last step: {', '.join(f'{r:g}' for r in found.learning_rates)}{groups}")
    lines += [f"  {note}" for note in found.notes]
    lines += [f"  MISSING {_without_folder(line, found.folder)}" for line in diagnosis.remedies]
    lines.append(_verdict_line(diagnosis))
    return lines, diagnosis.healthy


def _recorded(sidecar: Sidecar, folder: Path) -> list[str]:
    s = sidecar.sampling
    count = sum(map(len, sidecar.optimizer_parameter_names))
    precision = sidecar.dtype if sidecar.mixed_precision == "no" else f"{sidecar.dtype} under {sidecar.mixed_precision}"
    step = rollouts_path(folder.parent, sidecar.step)
    recorded = "recorded" if step.exists() else "not recorded (train_prompts: from_run is not possible)"
    return [
        f"  sidecar: {sidecar.model_name}, {precision}, {count} optimizer entries named",
        *(f"  sampling: {line}" for line in sampling_in_words(folder, s)),
        f"  sequences of its last step: {recorded}",
    ]


def _without_folder(line: str, folder: Path) -> str:
    """A refusal without the folder that the first line names already."""
    return line.removeprefix(f"{folder} lacks ").removeprefix(f"{folder}/").removeprefix(f"{folder}: ")


def _verdict_line(diagnosis: Diagnosis) -> str:
    if diagnosis.verdict == NO:
        return "cannot be analysed as it is"
    if diagnosis.verdict == WITHOUT_ADAM:
        more = " and checkpoint.learning_rate=..." if "checkpoint.learning_rate" in diagnosis.give else ""
        return f"can be analysed without Adam's preconditioner only (fisher_kernel.preconditioning=none{more})"
    given = " with checkpoint.learning_rate=..." if diagnosis.found.rate_problem is not None else ""
    return f"can be analysed{given}: kernel, prediction split into batch, momentum and decay, attribution"


# ---------------------------------------------------------------------- a folder of many
def examine_all(path: Path, trust: bool = False) -> tuple[list[str], bool]:
    """Lines for a person, and whether nothing is missing: of a checkpoint, of a run's latest one, or of a folder of many.

    Raises UserError where the path holds none of these.
    """
    if importable(path):
        source = describe(path)
        return source.lines, source.healthy
    return examine_many(path, trust) if checkpoints_inside(path) else examine(path, trust)


def checkpoints_inside(folder: Path) -> list[Path]:
    """Folders directly inside that hold a checkpoint or a run; [] where `folder` is one itself, or there are none."""
    if not folder.is_dir() or _is_one(folder):
        return []
    return sorted(child for child in folder.iterdir() if child.is_dir() and _is_one(child))


def _is_one(folder: Path) -> bool:
    try:
        resolve_checkpoint(folder)
    except (UserError, OSError):
        return importable(folder)
    return True


def examine_many(folder: Path, trust: bool = False) -> tuple[list[str], bool]:
    """A table of the checkpoints in `folder`, one row each, and whether all of them are whole.

    A run is one row, its latest checkpoint. Folders that hold neither are counted below the table.
    """
    inside = checkpoints_inside(folder)
    rows = [("checkpoint", "what it is", "can be analysed", "what to do")]
    healthy = True
    for child in inside:
        row, whole = _row(child, trust)
        rows.append(row)
        healthy = healthy and whole
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(row[c].ljust(widths[c]) for c in range(3)), row[3]]).rstrip() for row in rows]
    others = sum(child.is_dir() and child not in inside for child in folder.iterdir())
    if others:
        lines.append(f"{others} other folder{'s' if others > 1 else ''} without a checkpoint")
    return lines, healthy


def _row(child: Path, trust: bool) -> tuple[tuple[str, str, str, str], bool]:
    source = describe(child) if importable(child) else None
    if source is not None and source.command is not None and source.moments:
        return (child.name, source.layout, AFTER_IMPORT, source.command), source.healthy
    diagnosis = diagnose(child, trust)
    return (child.name, diagnosis.kind, diagnosis.verdict, _what_to_do(diagnosis)), diagnosis.healthy


def _what_to_do(diagnosis: Diagnosis) -> str:
    first = diagnosis.remedies[:1]
    given = [f"give {' and '.join(diagnosis.give)}"] if diagnosis.give else []
    text = "; ".join([*(_without_folder(line, diagnosis.found.folder) for line in first), *given])
    return re.sub(r"\s+", " ", text) or "nothing: run analyze"
