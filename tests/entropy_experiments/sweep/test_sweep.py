"""The sweep: real analyses end to end, killed and resumed, shared among processes; its rules on quick stand-ins."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.sweep import run as sweep_module
from entropy_experiments.sweep.assemble import read_metrics
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.sweep.run import run_sweep, sweep_folder_for
from entropy_experiments.sweep.shards import Shard, shard_of_process, single_process
from entropy_experiments.sweep.targets import choose_checkpoints, name_runs, plan_sweep, sweep_name
from rl_training.configuration import load_config
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoint_edits import edit_optimizer
from tests.entropy_experiments.small_analysis import OFF, SMALL
from tests.warm_python import UNPAINTED, WarmProcess, warm_run

REAL = [
    *SMALL, *(f"entropy_analysis.analysis.{name}=false" for name in OFF if name != "sequence_clustering"),
    "entropy_analysis.analysis.step_scales=[1.0]",
]  # fmt: skip


def make_run(tiny_run: Path, folder: Path, steps=(4, 5, 6)) -> Path:
    """A run with these checkpoints: copies of one, each with its own step."""
    for step in steps:
        target = folder / f"checkpoint-{step}"
        shutil.copytree(tiny_run / "checkpoint-4", target)
        for name, key in (("trainer_state.json", "global_step"), ("entropy_experiments.json", "step")):
            content = json.loads((target / name).read_text())
            (target / name).write_text(json.dumps(content | {key: step}))
        edit_optimizer(target, lambda state: [entry["step"].fill_(step) for entry in state["state"].values()])  # noqa: B023
    shutil.copy(tiny_run / "metrics.jsonl", folder / "metrics.jsonl")
    return folder


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """Four checkpoints, the first of them broken."""
    folder = make_run(tiny_run, tmp_path_factory.mktemp("sweep") / "mine", (3, 4, 5))
    (folder / "checkpoint-3" / "adapter_model.safetensors").unlink()
    return folder


def command(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    return ["-m", "entropy_experiments", "sweep", "--trust", *arguments], env


def sweep(*arguments, **environment) -> subprocess.CompletedProcess:
    line, env = command(*arguments, **environment)
    return warm_run(*line, env=env, prelude=UNPAINTED)


@pytest.mark.slow
@pytest.mark.long
def test_real_sweep_killed_and_resumed_with_a_broken_checkpoint(run, tmp_path):
    """SIGKILL in the second analysis; what was done stays, the rest is done, the broken one is told in one line at the end."""
    arguments = [run, *REAL, "--folder", tmp_path / "out"]
    first, part = tmp_path / "out/checkpoints/mine_checkpoint-4", tmp_path / "out/checkpoints/mine_checkpoint-5.part"
    line, env = command(*arguments)
    process = WarmProcess(*line, env=env, prelude=UNPAINTED)
    deadline = time.time() + 400
    while not (first.is_dir() and part.is_dir()):
        assert process.poll() is None and time.time() < deadline, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = (first / "summary.json").stat().st_mtime_ns
    assert part.is_dir() and not (tmp_path / "out/sweep.json").exists(), (
        "an unfinished sweep must not look like a whole one"
    )
    again = sweep(*arguments)
    assert again.returncode == 2 and "unfinished sweep" in again.stderr and "--resume" in again.stderr
    resumed = sweep(*arguments, "--resume")
    errors = [text for text in resumed.stderr.splitlines() if text.startswith("error: ")]
    assert resumed.returncode == 2 and len(errors) == 1 and "Traceback" not in resumed.stderr, resumed.stderr
    assert "1 of 3 checkpoints" in errors[0] and "mine_checkpoint-3" in errors[0] and "adapter_model" in errors[0]
    assert (first / "summary.json").stat().st_mtime_ns == made, "a finished checkpoint was done again"
    assert not part.exists()
    out = tmp_path / "out"
    content = json.loads((out / "sweep.json").read_text())
    assert [entry["status"] for entry in content["checkpoints"]] == ["failed", "done", "done"] and not content[
        "complete"
    ]
    table = pd.read_parquet(out / "results.parquet")
    assert list(table.columns) == "run step quantity part estimator value standard_error unit".split()
    assert set(table.step) == {4, 5} and table.value.notna().all()
    summary = json.loads((out / "checkpoints/mine_checkpoint-5/summary.json").read_text())
    total = table[(table.step == 5) & (table.quantity == "predicted") & (table.part == "momentum")]
    value = total[(total.estimator == "split") & (total.unit == "nats per token")].value.item()
    assert value == summary["predicted"]["split"]["momentum"]["value"]
    sets = [json.loads((out / f"checkpoints/mine_checkpoint-{s}/evaluation_set.json").read_text()) for s in (4, 5)]
    assert sets[0] == sets[1], "the same evaluation prompts and seeds at every checkpoint"
    evolution = json.loads((out / "evolution.json").read_text())["mine"]
    # the two checkpoints are the same policy: nothing moved
    assert (
        evolution["changes"][0]["observed"]["value"] == 0.0
        and evolution["comparable"]["prompts"] == evolution["comparable"]["of"]
    )
    assert (out / "report.html").read_text().count("checkpoints/mine_checkpoint-") == 2
    assert len(list((out / "figures").glob("mine_*.png"))) == 6


@pytest.mark.long
def test_two_launched_processes_share_without_a_word(tiny_run, tmp_path):
    """RANK and WORLD_SIZE of a launcher, a meeting point where nobody is: each does its own, rank 0 puts it together."""
    run = make_run(tiny_run, tmp_path / "mine", (4, 5))
    arguments = [run, *REAL, "--folder", tmp_path / "out"]
    running = []
    for rank in (0, 1):
        launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        line, env = command(*arguments, **launcher, MASTER_PORT="9")
        running.append(WarmProcess(*line, env=env, prelude=UNPAINTED))
    outs = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], outs
    assert outs[0][0].strip() == str(tmp_path / "out/report.html") and outs[1][0] == ""
    assert "mine_checkpoint-4 (1 of 1)" in outs[0][1] and "mine_checkpoint-5 (1 of 1)" in outs[1][1]
    assert json.loads((tmp_path / "out/sweep.json").read_text())["complete"]


def steps_of(run, **selection):
    return [step for step, _ in choose_checkpoints(run, SweepConfig(checkpoints=selection).checkpoints)]


def test_choosing_checkpoints(small_run):
    assert steps_of(small_run) == [2, 4, 6, 8, 10]
    assert steps_of(small_run, stride=3) == [2, 8, 10], "the last is always among them"
    assert steps_of(small_run, last=2) == [8, 10]
    assert steps_of(small_run, steps=(10, 2, 2)) == [2, 10]
    with pytest.raises(UserError, match="no checkpoint of step 3 .*it has 2, 4, 6"):
        steps_of(small_run, steps=(2, 3))
    with pytest.raises(UserError, match="stride and last both"):
        load_config(SweepConfig, None, ["checkpoints.stride=2", "checkpoints.last=2"])


def test_names_of_runs(tmp_path, small_run):
    other = tmp_path / "other" / "mine"
    shutil.copytree(small_run, other)
    assert list(name_runs([small_run, other])) == [f"{tmp_path.name}-mine", "other-mine"]
    assert sweep_name({name: tmp_path for name in "abcde"}) == "a+b+3-more"
    for runs, words in (
        ([], "at least one"),
        ([tmp_path / "no"], "does not exist"),
        ([small_run / "checkpoint-2"], "single checkpoint"),
        ([small_run, small_run / ".." / "mine"], "named twice"),
    ):
        with pytest.raises(UserError, match=words):
            name_runs(runs)
    with pytest.raises(UserError, match="no checkpoint-"):
        plan_sweep(name_runs([tmp_path / "other"]), SweepConfig())


def test_every_checkpoint_gets_the_same_configuration():
    """The shipped YAML is the default; what it says of an analysis is what an analysis is given."""
    shipped = load_config(SweepConfig, Path(sweep_module.__file__).parents[1] / "configs/entropy_sweep.yaml")
    assert shipped == SweepConfig()
    partly = load_config(SweepConfig, None, ["entropy_analysis.analysis.buffers=false", "seed=3"])
    single = partly.of_a_checkpoint()
    assert type(single) is FisherAnalysisConfig and single.seed == 3
    analysis = single.entropy_analysis.analysis
    assert not (analysis.buffers or analysis.intervention or analysis.weighting_steps or analysis.fresh_scales)
    assert single.entropy_analysis.sampling.eval_prompts == "fixed_set"
    with pytest.raises(UserError, match="same evaluation prompts"):
        load_config(SweepConfig, None, ["entropy_analysis.sampling.same_prompts=true"])


def test_shards_deal_out_everything_once():
    items = list(range(11))
    for count in (1, 2, 3, 8, 20):
        dealt = [Shard(i, count).of(items) for i in range(count)]
        assert sorted(sum(dealt, [])) == items and max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize(
    ("shard", "environment", "expected"),
    [
        (None, {}, (0, 1, "alone")),
        ("2/8", {}, (1, 8, "shard")),
        (None, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, "rank")),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10"},
            (2, 3, "array"),
        ),
        ("1/1", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}, (0, 1, "alone")),
    ],
)
def test_where_a_shard_comes_from(shard, environment, expected):
    found = shard_of_process(shard, environment)
    assert (found.index, found.count, found.kind) == expected


@pytest.mark.parametrize(
    ("shard", "environment", "words"),
    [
        ("0/8", {}, "the second of eight"),
        ("9/8", {}, "--shard 9/8"),
        ("2/8", {"RANK": "0", "WORLD_SIZE": "2"}, "use one of them"),
        (None, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}, "have gaps"),
        (None, {"WORLD_SIZE": "two"}, "no whole number"),
    ],
)
def test_shards_that_make_no_sense(shard, environment, words):
    with pytest.raises(UserError, match=words):
        shard_of_process(shard, environment)


def test_the_launchers_variables_come_back(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with single_process():
        assert "WORLD_SIZE" not in os.environ
    assert os.environ["WORLD_SIZE"] == "2"


def test_shards_one_after_the_other(quick, small_run, tmp_path):
    """Whoever finishes last puts the results together."""
    calls, broken = quick
    broken.add(6)
    done = [run_sweep([small_run], folder=tmp_path / "out", shard=f"{i}/3") for i in (2, 1, 3)]
    assert calls == [4, 10, 2, 8, 6]
    assert [d.report is not None for d in done] == [False, False, True]
    assert done[0].open == ("mine_checkpoint-2", "mine_checkpoint-6", "mine_checkpoint-8")
    assert done[2].failed == {"mine_checkpoint-6": "this one is broken"}
    with pytest.raises(UserError, match="finished sweep"):
        run_sweep([small_run], folder=tmp_path / "out", shard="1/3")


def test_a_part_can_be_put_together(quick, small_run, tmp_path):
    run_sweep([small_run], folder=tmp_path / "out", shard="1/2")
    part = run_sweep([small_run], folder=tmp_path / "out", assemble=True)
    assert part.report and part.open == ("mine_checkpoint-4", "mine_checkpoint-8")
    entries = json.loads((tmp_path / "out/sweep.json").read_text())["checkpoints"]
    assert [entry["status"] for entry in entries] == ["done", "open", "done", "open", "done"]
    with pytest.raises(UserError, match="no sweep at"):
        run_sweep([small_run], folder=tmp_path / "nothing", assemble=True)


def test_processes_of_other_settings_are_refused(quick, small_run, tmp_path):
    run_sweep([small_run], folder=tmp_path / "out", shard="1/2")
    other = load_config(SweepConfig, None, ["seed=1"])
    with pytest.raises(UserError, match="other checkpoints or settings"):
        run_sweep([small_run], other, folder=tmp_path / "out", shard="2/2")


def test_resume_tries_the_broken_again_and_takes_new_checkpoints(quick, small_run, tmp_path):
    calls, broken = quick
    broken.add(4)
    first = run_sweep([small_run], folder=tmp_path / "out")
    assert list(first.failed) == ["mine_checkpoint-4"] and first.report
    broken.clear()
    calls.clear()
    (small_run / "checkpoint-12").mkdir()
    (small_run / "checkpoint-12/trainer_state.json").write_text(json.dumps({"global_step": 12}))
    again = run_sweep([small_run], folder=tmp_path / "out", resume=True)
    assert calls == [4, 12] and not again.failed
    assert json.loads((tmp_path / "out/sweep.json").read_text())["complete"]


def test_what_does_not_match_is_refused_before_any_work(quick, small_run, tmp_path):
    calls, _ = quick
    out = tmp_path / "out"
    run_sweep([small_run], load_config(SweepConfig, None, ["checkpoints.last=2"]), folder=out)
    calls.clear()
    with pytest.raises(UserError, match="another configuration .there seed: 0, now seed: 5"):
        run_sweep([small_run], load_config(SweepConfig, None, ["seed=5"]), folder=out, resume=True)
    state = small_run / "checkpoint-10/trainer_state.json"
    state.write_text(json.dumps({"global_step": 10, "trained": "anew"}))
    with pytest.raises(UserError, match="another checkpoint-10"):
        run_sweep([small_run], folder=out, resume=True)
    (out / "checkpoints/mine_checkpoint-8.source.json").unlink()
    with pytest.raises(UserError, match="does not say what it was made from"):
        run_sweep([small_run], folder=out, resume=True)
    assert not calls


def test_folders_in_the_way(quick, small_run, tmp_path):
    calls, _ = quick
    out = tmp_path / "out"
    run_sweep([small_run], folder=out)
    with pytest.raises(UserError, match="--overwrite"):
        run_sweep([small_run], folder=out)
    calls.clear()
    run_sweep([small_run], folder=out, overwrite=True)
    assert len(calls) == 5
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="not the folder of a sweep"):
            run_sweep([small_run], folder=strange, **options)
    assert (strange / "thesis.tex").exists()
    with pytest.raises(UserError, match="in one process"):
        run_sweep([small_run], folder=out, overwrite=True, shard="1/2")


def test_a_full_disk_stops_the_sweep(quick, small_run, tmp_path, monkeypatch):
    def full(*args, **options):
        raise UserError("no space left on the disk") from OSError(28, "No space left on device")

    monkeypatch.setattr(sweep_module, "run_fisher_analysis", full)
    with pytest.raises(UserError, match="no space left"):
        run_sweep([small_run], folder=tmp_path / "out")
    assert not list((tmp_path / "out/checkpoints").glob("*.error.json"))


def test_resuming_after_midnight_finds_yesterdays_folder(small_run, tmp_path):
    runs = name_runs([small_run])
    old = tmp_path / "sweep_2020-01-31" / "mine"
    old.mkdir(parents=True)
    (old / "sweep_plan.json").write_text("{}")
    assert sweep_folder_for(runs, str(tmp_path), latest=True) == old
    assert sweep_folder_for(runs, str(tmp_path)).parent.name != "sweep_2020-01-31"


def test_two_runs_in_one_sweep(quick, small_run, tmp_path):
    other = tmp_path / "second"
    shutil.copytree(small_run, other)
    done = run_sweep(
        [small_run, other], load_config(SweepConfig, None, ["checkpoints.last=2"]), folder=tmp_path / "out"
    )
    table = pd.read_parquet(tmp_path / "out/results.parquet")
    assert set(table.run) == {"mine", "second"} and done.report is not None
    page = done.report.read_text()
    assert "mine: Between steps 8 and 10" in page and "second: Between steps 8 and 10" in page


def test_an_unreadable_result_is_told(quick, small_run, tmp_path):
    run_sweep([small_run], folder=tmp_path / "out")
    (tmp_path / "out/checkpoints/mine_checkpoint-4/summary.json").write_text("{")
    run_sweep([small_run], folder=tmp_path / "out", assemble=True)
    entry = json.loads((tmp_path / "out/sweep.json").read_text())["checkpoints"][1]
    assert entry["status"] == "unreadable" and "not valid JSON" in entry["error"]


def test_reading_a_runs_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "a": 3}\n\n{"step": 3, "a"')
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 3}], (
        "trained twice: the last; cut short: left out"
    )
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
