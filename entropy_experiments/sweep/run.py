"""Every chosen checkpoint of one or several runs through one analysis, with the same evaluation prompts and seeds.

Resumable checkpoint by checkpoint: each analysis appears whole or not at all, and what is there is kept where configuration and
checkpoint match. Several processes share the work without talking to each other (entropy_experiments/sweep/shards.py); whoever
finds everything done puts the results together. See docs/guides/sweeps.md.
"""

from __future__ import annotations

import datetime
import gc
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from entropy_experiments.buffers.recorded_task import check_trust
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.run.launch import JOINING
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.sweep.assemble import assemble_sweep
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.folder import SweepFolder
from entropy_experiments.sweep.shards import Shard, shard_of_process, single_process
from entropy_experiments.sweep.targets import Target, name_runs, plan_sweep, sweep_name
from rl_training.configuration import dump_config
from rl_training.errors import ResumableError, UserError
from rl_training.files import remove_leftovers, strange_files, write_json_whole, write_whole
from rl_training.run.disk import disk_is_full
from rl_training.run.folder_lock import LOCK_NAME, locked

_POLL_SECONDS = 1.0
_REMIND_SECONDS = 300.0
# Launched processes start within this of one another; an error older than it is of an earlier launch.
_START_SPREAD_SECONDS = 120.0


class SweepOptions(TypedDict, total=False):
    """How a sweep is run, beside what it computes."""

    folder: str | Path | None
    """Where to; by default `sweep_folder_for`."""
    resume: bool
    """Go on with a sweep, keeping what matches; checkpoints that failed are tried again."""
    overwrite: bool
    """Delete a sweep that is there and start anew."""
    keep_going: bool
    """Write the results of a checkpoint even where a self-check or an analysis fails."""
    trust: bool
    """Whether a checkpoint's record may name a task that opens a file, imports a function or evaluates completions."""
    shard: str | None
    """"2/8": which part of the checkpoints is this process's, see sweep.shards."""
    assemble: bool
    """Analyse nothing, put together what there is."""


@dataclass(frozen=True)
class Sweep:
    """What this process leaves: the folder, and what became of every checkpoint.

    report: None until the results are put together. failed: checkpoint -> why, of the whole sweep as far as it is known.
    open: checkpoints that other processes have yet to do. shard: which part this process did.
    """

    folder: Path
    targets: tuple[Target, ...]
    report: Path | None
    failed: dict[str, str]
    open: tuple[str, ...]
    shard: Shard


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One sweep, as this process does it: runs by name, the checkpoints of all processes, and how."""

    runs: dict[str, Path]
    targets: list[Target]
    config: SweepConfig
    shard: Shard
    place: SweepFolder
    reporter: Reporter
    resume: bool = False
    overwrite: bool = False
    keep_going: bool = False
    trust: bool = False
    assemble: bool = False

    @property
    def waits(self) -> bool:
        """Whether it is the first of launched processes, which waits for the others."""
        return self.shard.kind == "rank" and self.shard.index == 0


def sweep_folder_for(runs: dict[str, Path], output_dir: str, latest: bool = False) -> Path:
    """`<output_dir>/sweep_<today>/<runs>`; latest: that of the last day that has one, for resuming after midnight."""
    name, root = sweep_name(runs), Path(output_dir)
    if latest:
        found = sorted(folder for folder in root.glob("sweep_*") if (folder / name / "sweep_plan.json").exists())
        if found:
            return found[-1] / name
    return root / f"sweep_{datetime.date.today().isoformat()}" / name


def run_sweep(
    runs: Sequence[str | Path],
    config: SweepConfig | None = None,
    *,
    reporter: Reporter = SILENT,
    **options: Unpack[SweepOptions],
) -> Sweep:
    """Analyse this process's part of the checkpoints, and put the results together once everything is done.

    A checkpoint that cannot be analysed does not stop the others: see Sweep.failed.

    Args:
        runs: Run folders.
        config: What is analysed; None: the default.
        reporter: Is told of each stage as it begins, and of each checkpoint that is to be done in this process.
        **options: See SweepOptions.

    Raises:
        UserError: Bad input, a folder that is in the way, a finished checkpoint that does not match, or a full disk.
    """
    config, named = config or SweepConfig(), name_runs(runs)
    folder, shard = options.pop("folder", None), shard_of_process(options.pop("shard", None))
    targets, assemble = plan_sweep(named, config), options.get("assemble", False)
    again = options.get("resume", False) or assemble
    if options.get("overwrite", False) and (shard.count > 1 or again):
        raise UserError(
            "--overwrite starts a sweep anew in one process: leave out --resume, --assemble and shards, or delete it"
        )
    place = SweepFolder(Path(folder) if folder else sweep_folder_for(named, config.output_dir, again))
    if assemble and not place.plan_file.exists():
        raise UserError(f"there is no sweep at {place.path} to put together: name it with --folder")
    work = _Work(
        runs=named, targets=targets, config=config, shard=shard, place=place, reporter=reporter, **options
    )  # fmt: skip
    # Processes that share a sweep hold it together; one that does all of it holds it alone.
    lock = locked(place.path.with_name(f".{place.path.name}{LOCK_NAME}"), str(place.path), shared=shard.count > 1)
    with nullcontext() if assemble else lock:
        return _do(work)


def _do(work: _Work) -> Sweep:
    place, started = work.place, time.time()
    if not work.assemble:
        _prepare(work)
        with single_process(), place.locked(_lock_of(work.shard.index), wait=False):
            _use_own_device(work.shard)
            _analyze_shard(work)
        if work.waits:
            _wait_for_the_others(work, started)
    report = None
    left = place.open_targets(work.targets)
    if work.assemble or (not left and (work.waits or work.shard.kind != "rank")):
        work.reporter.stage("putting the sweep together")
        with place.locked("assemble", wait=True):
            if not left:  # nobody analyses any more: what is unfinished is a killed process's
                remove_leftovers(place.path)
            report = assemble_sweep(place, work.runs, work.targets, work.config)
    failed = {t.name: error["error"] for t in work.targets if (error := place.error_of(t)) is not None}
    return Sweep(place.path, tuple(work.targets), report, failed, tuple(t.name for t in left), work.shard)


def _prepare(work: _Work) -> None:
    """Make the folder and its plan, or see that the plan that is there is this one."""
    place = work.place
    if work.overwrite:
        place.remove()
    plan = {
        "runs": {name: str(path) for name, path in work.runs.items()},
        "checkpoints": [target.name for target in work.targets],
        "configuration": dump_config(work.config),
    }
    if place.path.exists() and not place.plan_file.exists():
        # Locks alone: another process is just beginning, or was killed before it wrote the plan.
        if strange_files(place.path, {"locks"}):
            raise UserError(
                f"{place.path} exists and is not the folder of a sweep: choose another with --folder or output_dir"
            )
    with place.locked("plan", wait=True):
        if place.plan_file.exists() and not work.resume:
            if place.sweep_file.exists():
                raise UserError(
                    f"{place.path} is a finished sweep: pass --resume to do what failed or is new, or --overwrite"
                )
            if work.shard.count == 1:
                raise UserError(f"{place.path} is an unfinished sweep: pass --resume to go on with it, or --overwrite")
            if json.loads(place.plan_file.read_text(encoding="utf-8")) != plan:
                raise UserError(
                    f"{place.path} was begun with other checkpoints or settings than this process has: start all processes of a "
                    "sweep alike, or pass --resume to go on with these"
                )
        write_json_whole(place.plan_file, plan)
        write_whole(place.path / "config.yaml", plan["configuration"])


def _use_own_device(shard: Shard) -> None:
    """Of several processes on one machine, each takes its own GPU where there are any."""
    import torch

    if shard.local_rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(shard.local_rank % torch.cuda.device_count())


def _analyze_shard(work: _Work) -> None:
    place, own, single = work.place, work.shard.of(work.targets), work.config.of_a_checkpoint()
    configuration = dump_config(single)
    for target in own:  # before any work: what does not match is refused at once
        if place.outcome(target) == "done":
            place.require_same(target, configuration)
        elif work.resume:
            place.clear_error(target)
    todo = place.open_targets(own)
    for target in todo:
        check_trust(target.path, single, work.trust)
    for number, target in enumerate(todo, start=1):
        work.reporter.checkpoint(target.name, number, len(todo))
        with place.locked(target.name, wait=False) as ours:
            if not ours or place.outcome(target) != "open":
                continue  # another process of the same shard is at it, or was
            try:
                place.write_source(target)
                run_fisher_analysis(
                    target.path, single, folder=place.results(target), resume=True, keep_going=work.keep_going,
                    trust=work.trust, reporter=work.reporter,
                )  # fmt: skip
            except Exception as error:  # whatever it is: it is told at the end, and the others are still done
                if disk_is_full(error):
                    raise
                place.write_error(target, error)
                work.reporter.stage(f"FAILED: {target.name}")
        gc.collect()


def _lock_of(process: int) -> str:
    """The lock that a process of a launch holds while it analyses."""
    return f"process-{process + 1}"


def _wait_for_the_others(work: _Work, started: float) -> None:
    """Until every checkpoint of the other launched processes is done, or failed in this launch.

    Raises ResumableError where one of them ended, or never came, and has left some: a launcher ends all when one dies, but not
    every launch has a launcher that is alive.
    """
    place, reminded, seen = work.place, 0.0, set[int]()
    while True:
        held = {index: place.held(_lock_of(index)) for index in range(1, work.shard.count)}
        seen |= {index for index, is_held in held.items() if is_held}
        left = _left(work, started)  # after the locks were looked at: one that ended in between has left nothing
        if not left:
            return
        late = time.time() - started > JOINING.total_seconds()
        gone = [index for index, is_held in held.items() if is_held is False and (late or index in seen)]
        for index in gone:
            for target in replace(work.shard, index=index).of(work.targets):
                if target in left:
                    raise ResumableError(
                        f"process {index + 1} of this sweep died or was stopped, and left {target.name}: its own output "
                        "says why. What is finished is kept: the same command with --resume goes on, with any number of processes"
                    )
        if time.monotonic() - reminded > _REMIND_SECONDS:
            reminded = time.monotonic()
            names = [target.name for target in left]
            work.reporter.stage(f"waiting for other processes: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}")
        time.sleep(_POLL_SECONDS)


def _left(work: _Work, started: float) -> list[Target]:
    """Checkpoints that are neither done nor failed in this launch."""
    errors = {target: work.place.error_of(target) for target in work.targets if not work.place.results(target).is_dir()}
    return [t for t, error in errors.items() if error is None or error["time"] < started - _START_SPREAD_SECONDS]
