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
from dataclasses import dataclass
from pathlib import Path

from entropy_experiments.buffers.recorded_task import check_trust
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.sweep.assemble import assemble_sweep
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.folder import SweepFolder
from entropy_experiments.sweep.shards import Share, share_of_process, single_process
from entropy_experiments.sweep.targets import Target, name_runs, plan_sweep, sweep_name
from rl_training.configuration import dump_config
from rl_training.errors import UserError
from rl_training.files import strange_files, write_json_whole, write_whole
from rl_training.run.disk import disk_is_full
from rl_training.run.folder_lock import LOCK_NAME, locked

_POLL_SECONDS = 1.0
_REMIND_SECONDS = 300.0
# Launched processes start within this of one another; an error older than it is of an earlier launch.
_START_SPREAD_SECONDS = 120.0


@dataclass(frozen=True)
class Sweep:
    """What this process leaves: the folder, and what became of every checkpoint.

    report: None until the results are put together. failed: checkpoint -> why, of the whole sweep as far as it is known.
    open: checkpoints that other processes have yet to do. share: which part this process did.
    """

    folder: Path
    targets: tuple[Target, ...]
    report: Path | None
    failed: dict[str, str]
    open: tuple[str, ...]
    share: Share


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
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_going: bool = False,
    trust: bool = False,
    shard: str | None = None,
    assemble: bool = False,
    reporter: Reporter = SILENT,
) -> Sweep:
    """Analyse this process's share of the checkpoints, and put the results together once everything is done.

    folder: where to; by default `sweep_folder_for`. resume: go on with a sweep, keeping what matches; checkpoints that failed
    are tried again. overwrite: delete a sweep that is there and start anew. keep_going, trust: as in run_fisher_analysis.
    shard: "2/8", see sweep_shares. assemble: analyse nothing, put together what there is. reporter: is told of each
    stage as it begins, and of each checkpoint that is to be done in this process.

    A checkpoint that cannot be analysed does not stop the others: see Sweep.failed. Raises UserError for bad input, a folder
    that is in the way, a finished checkpoint that does not match, and a full disk.
    """
    config, named = config or SweepConfig(), name_runs(runs)
    share, targets = share_of_process(shard), plan_sweep(named, config)
    if overwrite and (share.count > 1 or resume or assemble):
        raise UserError(
            "--overwrite starts a sweep anew in one process: leave out --resume, --assemble and shares, or delete it"
        )
    target_folder = Path(folder) if folder else sweep_folder_for(named, config.output_dir, resume or assemble)
    place = SweepFolder(target_folder)
    if assemble and not place.plan_file.exists():
        raise UserError(f"there is no sweep at {place.path} to put together: name it with --folder")
    # Processes that share a sweep hold it together; one that does all of it holds it alone.
    lock = locked(place.path.with_name(f".{place.path.name}{LOCK_NAME}"), str(place.path), shared=share.count > 1)
    with nullcontext() if assemble else lock:
        return _sweep_into(
            place, named, targets, config, share, resume, overwrite, keep_going, trust, assemble, reporter
        )


def _sweep_into(
    place: SweepFolder,
    named: dict[str, Path],
    targets: list[Target],
    config: SweepConfig,
    share: Share,
    resume: bool,
    overwrite: bool,
    keep_going: bool,
    trust: bool,
    assemble: bool,
    reporter: Reporter,
) -> Sweep:
    started = time.time()
    if not assemble:
        _prepare(place, named, targets, config, share, resume, overwrite)
        with single_process():
            _use_own_device(share)
            _analyze_share(place, share.of(targets), config, resume, keep_going, trust, reporter)
        if share.kind == "rank" and share.index == 0:
            _wait_for_the_others(place, targets, started, reporter)
    report = None
    left = place.open_targets(targets)
    if assemble or (not left and (share.kind != "rank" or share.index == 0)):
        reporter.stage("putting the sweep together")
        with place.locked("assemble", wait=True):
            report = assemble_sweep(place, named, targets, config)
    failed = {t.name: error["error"] for t in targets if (error := place.error_of(t)) is not None}
    return Sweep(place.path, tuple(targets), report, failed, tuple(t.name for t in left), share)


def _prepare(
    place: SweepFolder,
    runs: dict[str, Path],
    targets: list[Target],
    config: SweepConfig,
    share: Share,
    resume: bool,
    overwrite: bool,
) -> None:
    """Make the folder and its plan, or see that the plan that is there is this one."""
    if overwrite:
        place.remove()
    plan = {
        "runs": {name: str(path) for name, path in runs.items()},
        "checkpoints": [target.name for target in targets],
        "configuration": dump_config(config),
    }
    if place.path.exists() and not place.plan_file.exists():
        # Locks alone: another process is just beginning, or was killed before it wrote the plan.
        if strange_files(place.path, {"locks"}):
            raise UserError(
                f"{place.path} exists and is not the folder of a sweep: choose another with --folder or output_dir"
            )
    with place.locked("plan", wait=True):
        if place.plan_file.exists() and not resume:
            if place.sweep_file.exists():
                raise UserError(
                    f"{place.path} is a finished sweep: pass --resume to do what failed or is new, or --overwrite"
                )
            if share.count == 1:
                raise UserError(f"{place.path} is an unfinished sweep: pass --resume to go on with it, or --overwrite")
            if json.loads(place.plan_file.read_text(encoding="utf-8")) != plan:
                raise UserError(
                    f"{place.path} was begun with other checkpoints or settings than this process has: start all processes of a "
                    "sweep alike, or pass --resume to go on with these"
                )
        write_json_whole(place.plan_file, plan)
        write_whole(place.path / "config.yaml", plan["configuration"])


def _use_own_device(share: Share) -> None:
    """Of several processes on one machine, each takes its own GPU where there are any."""
    import torch

    if share.local_rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(share.local_rank % torch.cuda.device_count())


def _analyze_share(
    place: SweepFolder,
    own: list[Target],
    config: SweepConfig,
    resume: bool,
    keep_going: bool,
    trust: bool,
    reporter: Reporter,
) -> None:
    single = config.of_a_checkpoint()
    configuration = dump_config(single)
    for target in own:  # before any work: what does not match is refused at once
        if place.outcome(target) == "done":
            place.require_same(target, configuration)
        elif resume:
            place.clear_error(target)
    todo = place.open_targets(own)
    for target in todo:
        check_trust(target.path, single, trust)
    for number, target in enumerate(todo, start=1):
        reporter.checkpoint(target.name, number, len(todo))
        with place.locked(target.name, wait=False) as ours:
            if not ours or place.outcome(target) != "open":
                continue  # another process of the same share is at it, or was
            try:
                place.write_source(target)
                options = {"resume": True, "keep_going": keep_going, "trust": trust, "reporter": reporter}
                run_fisher_analysis(target.path, single, folder=place.results(target), **options)
            except Exception as error:  # whatever it is: it is told at the end, and the others are still done
                if disk_is_full(error):
                    raise
                place.write_error(target, error)
                reporter.stage(f"FAILED: {target.name}")
        gc.collect()


def _wait_for_the_others(place: SweepFolder, targets: list[Target], started: float, reporter: Reporter) -> None:
    """Until every checkpoint of the other launched processes is done, or failed in this launch."""
    reminded = 0.0
    while True:
        errors = {target: place.error_of(target) for target in targets if not place.results(target).is_dir()}
        left = [
            t.name for t, error in errors.items() if error is None or error["time"] < started - _START_SPREAD_SECONDS
        ]
        if not left:
            return
        if time.monotonic() - reminded > _REMIND_SECONDS:
            reminded = time.monotonic()
            reporter.stage(f"waiting for other processes: {', '.join(left[:3])}{', …' if len(left) > 3 else ''}")
        time.sleep(_POLL_SECONDS)
