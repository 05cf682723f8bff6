"""One analysis from a checkpoint to a finished results folder.

Work happens in `<folder>.part`, which is renamed when everything in it is whole and every self-check has been made. Bad input
and failed checks remove it again; a run that was killed, or stopped by something outside, leaves its finished pieces there,
and resuming goes on with them. A folder that exists is never touched unless asked. Several processes of one launch share the
kernels; the first of them does the rest.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from entropy_core.passes.forward import input_device
from entropy_core.passes.state import PassState
from entropy_core.processes import Processes
from entropy_experiments.analyses.headline_units import (
    leaving_out_summary,
    sequence_intervals,
    shares_of_prompts,
    with_training_noise,
)
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.analyses.precision_in_training import with_training_precision
from entropy_experiments.analyses.prompt_structure import kernel_structure
from entropy_experiments.analyses.registry import run_analyses
from entropy_experiments.buffers.recorded_task import check_trust
from entropy_experiments.buffers.sampling_plan import SamplingPlan, plan_sampling
from entropy_experiments.buffers.scored_alone import refuse_dependence, refuse_other_drawing
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.checkpoints.folder import checkpoint_step, resolve_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.cut_checkpoint import opened_checkpoint, own_results, refuse_sharding
from entropy_experiments.double_sampling import (
    Buffers,
    TrainingBuffer,
    draw_buffers,
    evaluation_set,
    score_for_the_reader,
)
from entropy_experiments.fisher_analyzer import analyze_batches
from entropy_experiments.kernel.options import KernelOptions, kernel_options
from entropy_experiments.kernel.unfinished_work import FOLDER_NAME, UnfinishedWork, describe_work
from entropy_experiments.records.analysis_results import AnalysesRecord, finished
from entropy_experiments.records.estimate_entries import finite_number
from entropy_experiments.records.folder_files import refuse_replacing, written_data
from entropy_experiments.records.history import stored_state, training_history
from entropy_experiments.records.leave_one_out import FILE_NAME as LEAVE_ONE_OUT
from entropy_experiments.records.leave_one_out import write_leave_one_out
from entropy_experiments.records.policy import describe_policy
from entropy_experiments.records.record import json_of
from entropy_experiments.records.summarize import summarize
from entropy_experiments.records.summary import KernelModules, Summary
from entropy_experiments.records.writer import (
    describe_environment,
    write_history,
    write_json,
    write_kernels,
    write_run,
    write_sequences,
    write_summary,
)
from entropy_experiments.report.page import write_report
from entropy_experiments.run.launch import join_launch
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.run.self_checks import SelfCheck
from entropy_experiments.run.stage_times import StageTimes
from entropy_experiments.step.numbers import AnalysisNumbers
from entropy_experiments.step.settings import settings_of
from rl_training.configuration import dump_config
from rl_training.errors import ResumableError, UserError
from rl_training.files import refuse_link, remove_leftovers, replace_folder, write_whole
from rl_training.run.disk import disk_is_full
from rl_training.run.folder_lock import LOCK_NAME, locked
from rl_training.run.launched import world_size
from rl_training.run.sums import write_sums
from rl_training.sampling import Rollouts


@dataclass(frozen=True)
class FisherAnalysis:
    """A finished analysis: where it lies, its numbers, and both buffers in the order of the kernel's axes."""

    folder: Path
    report: Path
    summary: Summary
    numbers: AnalysisNumbers
    evaluation: Rollouts
    training: TrainingBuffer

    @property
    def failed_checks(self) -> list[SelfCheck]:
        return [check for check in self.numbers.checks if not check.passed]

    @property
    def failed_analyses(self) -> dict[str, str]:
        """Name -> what went wrong."""
        return self.summary.analyses.failed()


def results_folder_for(checkpoint_path: Path, step: int, output_dir: str) -> Path:
    """`<output_dir>/analysis_<today>/<run>_checkpoint-<step>`."""
    today = datetime.date.today().isoformat()
    return Path(output_dir) / f"analysis_{today}" / f"{checkpoint_path.resolve().parent.name}_checkpoint-{step}"


class RunOptions(TypedDict, total=False):
    """How an analysis is run, beside what it computes."""

    folder: str | Path | None
    """Where to; by default `results_folder_for`."""
    overwrite: bool
    """Replace a folder that exists, once the new one is whole."""
    resume: bool
    """Go on with the finished pieces of a run that was interrupted."""
    keep_going: bool
    """Write the results even where a self-check or an analysis fails (it is red in the report either way)."""
    trust: bool
    """Whether the checkpoint's record may name a task that opens a file, imports a function or evaluates completions."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One analysis to be done."""

    path: Path
    config: FisherAnalysisConfig
    processes: Processes
    clock: StageTimes
    folder: str | Path | None = None
    overwrite: bool = False
    resume: bool = False
    keep_going: bool = False
    trust: bool = False

    def target(self) -> Path:
        """Where the results go; resuming goes on with the newest unfinished folder of this name, on whatever day it was begun."""
        if self.folder:
            return Path(self.folder)
        root = self.config.output_dir
        today = results_folder_for(self.path, checkpoint_step(self.path), root)
        begun = sorted(Path(root).glob(f"analysis_*/{today.name}.part")) if self.resume else []
        return begun[-1].with_name(today.name) if begun else today


def run_fisher_analysis(
    checkpoint_path: str | Path,
    config: FisherAnalysisConfig | None = None,
    *,
    reporter: Reporter = SILENT,
    **options: Unpack[RunOptions],
) -> FisherAnalysis:
    """Analyse a checkpoint (or the latest of a run folder) and write its results folder with the report.

    Args:
        checkpoint_path: Folder of the checkpoint, or of the run.
        config: What is computed; None: the default.
        reporter: Is told of each stage as it begins.
        **options: See RunOptions.

    Raises:
        UserError: Bad input (nothing is left behind), a failed self-check, or a failed analysis.
        ShareDone: In all but the first process of a launch, when their part is done.
    """
    config = config or FisherAnalysisConfig()
    check_trust(checkpoint_path, config, options.get("trust", False))
    processes, clock = join_launch(on_cpu=config.checkpoint.on_cpu), StageTimes(reporter)
    if config.checkpoint.sharding is not None:
        refuse_sharding(processes, options.get("resume", False))
    # One answer for all: a run that trains on may have another latest checkpoint a moment later.
    path = processes.from_root(lambda: resolve_checkpoint(checkpoint_path))
    run = _Run(path=path, config=config, processes=processes, clock=clock, **options)
    target = processes.from_root(run.target)
    processes.from_root(lambda: _refuse_taken(target, run.overwrite))
    with contextlib.ExitStack() as held:
        lock = locked(target.with_name(f".{target.name}{LOCK_NAME}"), str(target))
        processes.from_root(lambda: held.enter_context(lock))
        own, sharing = held.enter_context(own_results(target, config, processes))
        clock.stage("loading the checkpoint")
        checkpoint = held.enter_context(opened_checkpoint(path, config, processes))
        return _analyze_into(own, replace(run, processes=sharing), checkpoint)


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already: pass --overwrite to replace it, or choose another output_dir")
    if target.exists():
        refuse_replacing(target)


def _analyze_into(target: Path, run: _Run, checkpoint: Checkpoint) -> FisherAnalysis:
    config, processes, clock = run.config, run.processes, run.clock
    with _part_folder(target, run) as part, PassState(checkpoint.model, true_derivatives=True):
        work = UnfinishedWork(part)
        processes.from_root(lambda: work.claim(describe_work(checkpoint.record.path, config)))
        plan = plan_sampling(checkpoint, config, run.trust)
        buffers = processes.from_root(lambda: _buffers(work, checkpoint, plan, run))
        kernel = kernel_options(config.entropy_analysis.fisher_kernel, work, processes, clock)
        inputs = analyze_buffers(checkpoint, plan, config, buffers, kernel, clock)
        if not run.keep_going:
            _refuse_failed_checks(inputs.numbers.checks)
        scored = score_for_the_reader(buffers.evaluation, plan)  # only now: the draw looked at no reward
        inputs = with_training_noise(replace(inputs, evaluation=scored), clock)
        inputs = with_training_precision(inputs, checkpoint.record, clock)
        analyses = run_analyses(inputs, clock, work)
        if not run.keep_going:
            _refuse_failed_analyses(analyses)
        clock.stage("writing the results")
        summary = _write(part, checkpoint, inputs, analyses)
        write_run(part / "run.json", _run_record(run, checkpoint, inputs, summary))
        write_sums(part, written_data(part))
        write_report(part, unfinished=True)
    return FisherAnalysis(target, target / "report.html", summary, inputs.numbers, *inputs.buffers)


def _run_record(run: _Run, checkpoint: Checkpoint, inputs: AnalysisInputs, summary: Summary) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        **describe_environment(),
        "processes": world_size(),
        "checkpoint": {**json_of(summary.checkpoint), "run_dir": str(checkpoint.record.run_dir)},
        "stages": run.clock.finished(),
        "seconds": round(sum(s["seconds"] for s in run.clock.stages), 3),
        "self_checks": [check.to_json() for check in inputs.numbers.checks],
        "failed_analyses": summary.analyses.failed(),
    }


def _buffers(work: UnfinishedWork, checkpoint: Checkpoint, plan: SamplingPlan, run: _Run) -> Buffers:
    kept = work.kept_buffers()
    if kept is None:
        kept = draw_buffers(checkpoint, plan, run.config, run.clock)
        work.keep_buffers(*kept)
    return kept


def _refuse_failed_checks(checks: Sequence[SelfCheck]) -> None:
    worst = next((check for check in checks if not check.passed), None)
    if worst is not None:
        raise UserError(
            f"self-check failed: {worst.name} is {worst.value:.3g}, allowed {worst.tolerance:g} ({worst.explanation}) "
            "Pass --keep-going to write the report all the same"
        )


def _refuse_failed_analyses(analyses: AnalysesRecord) -> None:
    failed = [f"{name} ({what})" for name, what in analyses.failed().items()]
    if failed:
        raise UserError(
            f"{'an analysis' if len(failed) == 1 else f'{len(failed)} analyses'} failed: {'; '.join(failed)}. Pass --keep-going "
            "to write the report with what there is, or switch it off under entropy_analysis.analysis"
        )


def analyze_buffers(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    buffers: Buffers,
    kernel: KernelOptions | None = None,
    reporter: Reporter = SILENT,
) -> AnalysisInputs:
    """Gradients, kernels, predictions and measurements of both buffers. kernel: None, as the configuration says, nothing kept.

    Raises:
        UserError: The numbers cannot be computed for this checkpoint.
    """
    device, training = input_device(checkpoint.model), buffers.training
    eval_batch = buffers.evaluation.to_batch(plan.sampling_config).to(device)
    train_batch = training.rollouts.to_batch(plan.sampling_config).to(device)
    kernel = kernel or kernel_options(config.entropy_analysis.fisher_kernel, reporter=reporter)
    try:
        refuse_dependence(checkpoint.model, [eval_batch, train_batch])
        if config.entropy_analysis.sampling.rows_are_drawn and config.checkpoint.sharding is None:
            refuse_other_drawing(checkpoint.model, eval_batch)
        found = analyze_batches(
            checkpoint.model,
            checkpoint.optimizer,
            eval_batch,
            train_batch,
            training.weights,
            settings_of(checkpoint, config, kernel),
            reporter,
        )
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{checkpoint.record.path}: {error}") from error
    return AnalysisInputs(
        model=checkpoint.model,
        optimizer=checkpoint.optimizer,
        tokenizer=checkpoint.tokenizer,
        config=config,
        plan=plan,
        evaluation=buffers.evaluation,
        training=training,
        eval_batch=eval_batch,
        numbers=found.numbers,
        side=found.training,
        gradients=found.gradients,
    )


def _modules(inputs: AnalysisInputs) -> KernelModules:
    """Parameters that the kernel's rows are formed of, of all that are trained, and the share of the prediction without them."""
    parameters = {name: p.numel() for name, p in inputs.model.named_parameters() if p.requires_grad}
    return KernelModules(
        parameters=sum(parameters[name] for name in inputs.side.kernel.setup.passes.names),
        trainable=sum(parameters.values()),
        patterns=inputs.config.entropy_analysis.fisher_kernel.filter_modules,
        left_out_share=None if inputs.numbers.step is None else finite_number(inputs.numbers.step.predictions.left_out),
    )


def _write(part: Path, checkpoint: Checkpoint, inputs: AnalysisInputs, analyses: AnalysesRecord) -> Summary:
    numbers, config = inputs.numbers, inputs.config
    kernel, settings = config.entropy_analysis.fisher_kernel, config.entropy_analysis
    structure = None
    if numbers.kernels is not None:
        labels = (np.array(rollouts.prompt_index) for rollouts in (inputs.evaluation, inputs.training.rollouts))
        structure = kernel_structure(numbers.kernels.fisher.cpu().numpy(), *labels)
        structure["same_prompts"] = settings.sampling.same_prompts
    sections = {
        "kernel": structure,
        "leaving_out": leaving_out_summary(inputs),
        "policy": describe_policy(checkpoint, inputs.plan),
        "kernel_modules": _modules(inputs),
        "training_precision": inputs.training_precision and inputs.training_precision.to_json(),
        "gradient_rows": inputs.side.kernel.setup.passes.formation.to_json(),
        "analyses": analyses,
    }
    summary = summarize(checkpoint, inputs.buffers, numbers, kernel.preconditioning, inputs.training_noise, sections)
    write_whole(part / "config.yaml", dump_config(config))
    shares = inputs.token_shares if finished(analyses.attribution) is not None else None
    write_sequences(
        part / "sequences.parquet", inputs.buffers, numbers, inputs.policy, shares, sequence_intervals(inputs)
    )
    write_leave_one_out(part / LEAVE_ONE_OUT, inputs.evaluation, numbers, shares_of_prompts(inputs))
    write_kernels(part / "kernel.safetensors", numbers, checkpoint, kernel.preconditioning)
    write_summary(part / "summary.json", summary)
    write_json(part / "evaluation_set.json", evaluation_set(config, inputs.evaluation))
    record = checkpoint.record
    write_history(part / "training_history.json", training_history(record.log_history, stored_state(record.path)))
    return summary


@contextmanager
def _part_folder(target: Path, run: _Run) -> Iterator[Path]:
    """`<target>.part`, renamed to `target` on success. On failure it is removed, unless it holds work to go on with and what
    failed was not the input; what an earlier run left is never removed.
    """
    part = target.with_name(target.name + ".part")
    refuse_link(part)
    earlier = run.processes.from_root(lambda: _begin(part, run.resume, run.overwrite))
    try:
        yield part
        remove_leftovers(part)
        replace_folder(part, target)
        shutil.rmtree(target / FOLDER_NAME, ignore_errors=True)  # only now: until then a kill loses nothing
    except BaseException as error:
        if not run.processes.is_root:
            raise
        full = disk_is_full(error)
        if isinstance(error, UserError) and not isinstance(error, ResumableError) and not earlier and not full:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if full:
            raise ResumableError(
                f"no space left on the disk of {target.parent}: free some and go on with --resume, or set output_dir=..."
            ) from error
        if not UnfinishedWork(part).begun:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _begin(part: Path, resume: bool, overwrite: bool) -> bool:
    """Whether earlier work lies there to go on with. Raises UserError where it does and nothing is said about it."""
    if part.exists() and not resume:
        if UnfinishedWork(part).begun and not overwrite:
            raise UserError(
                f"{part} holds the unfinished work of a run that was interrupted: go on with --resume, or start anew with "
                "--overwrite"
            )
        refuse_replacing(part)
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    return UnfinishedWork(part).begun
