"""One of several processes dies: the others end soon, say so in one line, and `--resume` ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from safetensors.torch import load_file

from entropy_experiments.entropy_runner import FisherAnalysis, run_fisher_analysis
from rl_training.configuration import dump_config
from tests.entropy_experiments.small_analysis import config
from tests.warm_python import UNPAINTED, WarmProcess

pytestmark = pytest.mark.long

SIZES = ("entropy_analysis.eval_batch_size=72", "entropy_analysis.fisher_kernel.strategy=memory")  # three blocks
SOON = 150.0  # seconds, on a busy machine, far below the half hour of gloo; nothing is waited for
ANALYZE = ["-m", "entropy_experiments"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes: how sums are cut among threads is in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory) -> FisherAnalysis:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_fisher_analysis(tiny_run, config(*SIZES), folder=tmp_path_factory.mktemp("quiet") / "quiet")
    finally:
        torch.set_num_threads(threads)


def start_two(commands: Sequence[Sequence[str]]) -> list[WarmProcess]:
    """A process a command, of one group, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = {**os.environ, **group, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return [
        WarmProcess(*command, env={**common, "RANK": str(rank)}, prelude=UNPAINTED)
        for rank, command in enumerate(commands)
    ]


def said(process: WarmProcess, within: float) -> list[str]:
    """Lines on stderr that are not progress, once the process has ended."""
    try:
        _, errors = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still there after {within:g} s: {process.communicate()[1][-2000:]}")
    return [line for line in errors.splitlines() if not line.startswith("analysis: ")]


@pytest.mark.parametrize(("victim", "block"), [(1, "tile-00000-rows-00001"), (0, "tile-00000-rows-00002")])
def test_the_other_ends_and_resuming_gives_the_same_bits(undisturbed, tiny_run, tmp_path, victim, block):
    settings = config(*SIZES, f"output_dir={tmp_path}")
    (tmp_path / "analysis.yaml").write_text(dump_config(settings))
    arguments = ["analyze", str(tiny_run), "--trust", "--config", str(tmp_path / "analysis.yaml")]
    dying = ["-m", "tests.entropy_experiments.dying_process", f"evaluation/{block}", *arguments]
    living = [*ANALYZE, *arguments]
    processes = start_two([dying, living] if victim == 0 else [living, dying])
    processes[victim].wait(timeout=400)
    died = time.monotonic()
    assert processes[victim].returncode == -signal.SIGKILL, said(processes[victim], 1.0)
    survivor = processes[1 - victim]
    lines = said(survivor, SOON)
    assert time.monotonic() - died < SOON and survivor.returncode == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: another process of this run died") and "--resume goes on" in lines[0]
    said(processes[victim], 1.0)

    assert_whole_after_resuming(undisturbed, tiny_run, settings, tmp_path, block)


def test_under_a_launcher(undisturbed, tiny_run, tmp_path):
    """torchrun stops the survivor; what is left goes on all the same."""
    settings, block = config(*SIZES, f"output_dir={tmp_path}"), "tile-00000-rows-00001"  # which process 1 writes
    (tmp_path / "analysis.yaml").write_text(dump_config(settings))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    dying = ["-m", "tests.entropy_experiments.dying_process", f"evaluation/{block}"]
    arguments = ["analyze", str(tiny_run), "--trust", "--config", str(tmp_path / "analysis.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*start, *dying, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0
    assert done.stderr.count("error: another process of this run died") <= 1, "it may be stopped before it says so"
    assert_whole_after_resuming(undisturbed, tiny_run, settings, tmp_path, block)


def test_accelerate_launch_on_cpus(undisturbed, tiny_run, tmp_path):
    """The documented command, where there is no GPU: two processes, and the kernel of one."""
    settings = config(*SIZES, f"output_dir={tmp_path}")
    (tmp_path / "analysis.yaml").write_text(dump_config(settings))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    arguments = [*ANALYZE, "analyze", str(tiny_run), "--trust", "--config", str(tmp_path / "analysis.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, *launch, *arguments], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = tmp_path.glob("analysis_*/*/report.html")
    assert json.loads((report.parent / "run.json").read_text())["processes"] == 2
    found, expected = (load_file(folder / "kernel.safetensors") for folder in (report.parent, undisturbed.folder))
    for name, matrix in expected.items():
        assert (found[name] - matrix).norm() <= 1e-6 * matrix.norm(), name


def assert_whole_after_resuming(undisturbed, tiny_run, settings, folder, block) -> None:
    half = next(folder.glob(f"analysis_*/*.part/work/evaluation/{block}.npz.part"))
    assert half.stat().st_size > 0 and not half.with_suffix("").exists()
    assert not list(folder.glob("analysis_*/*/report.html")), "no report of half an analysis"
    resumed = run_fisher_analysis(tiny_run, settings, resume=True)
    assert not list(folder.glob("analysis_*/*.part"))
    found, expected = (load_file(a.folder / "kernel.safetensors") for a in (resumed, undisturbed))
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        assert torch.equal(found[name], matrix), f"{name}: {(found[name] - matrix).abs().max():.1e} apart"


def test_who_never_comes_is_not_waited_for_without_end():
    script = (
        "from datetime import timedelta\n"
        "from entropy_experiments import cli\n"
        "from entropy_experiments.run import launch\n"
        "launch.JOINING = timedelta(seconds=2)\n"
        "cli.app = lambda **_: launch.join_launch(on_cpu=True)\n"
        "cli.main()"
    )
    alone, never = start_two([["-c", script], ["-c", ""]])
    lines = said(alone, 300.0)
    said(never, 300.0)
    assert alone.returncode == 2
    assert lines[-1].startswith("error: the processes of this run did not come together (") and len(lines) == 1


def test_long_work_of_one_is_waited_for():
    """JOINING bounds the start alone: drawing takes one process as long as it takes."""
    script = (
        "import time, torch\n"
        "from datetime import timedelta\n"
        "from entropy_experiments.run import launch\n"
        "launch.JOINING = timedelta(seconds=6)\n"
        "group = launch.join_launch(on_cpu=True)\n"
        "drawn = group.from_root(lambda: time.sleep(8) or 'drawn')\n"
        "assert drawn == 'drawn'\n"
        "if group.rank == 1: time.sleep(8)\n"
        "assert float(group.sum(torch.ones(1))) == 2.0"
    )
    for process in start_two([["-c", script], ["-c", script]]):
        assert said(process, 300.0) == [] and process.returncode == 0


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_ends_with_its_launcher_and_only_then(launched, tmp_path):
    """A parent that is killed starts one process, which would sleep on."""
    child = (
        "import time; from entropy_experiments.run import launcher_watch as w; w._POLL_SECONDS = 0.05; "
        "w.end_with_the_launcher(); print('there', flush=True); time.sleep(2); print('on its own', flush=True)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {"PYTHONPATH": os.getcwd()}
    environment |= {"TORCHELASTIC_RUN_ID": "1"} if launched else {}
    launcher = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None and launcher.stdout.readline() == "there\n"
    launcher.kill()
    out, error = launcher.communicate(timeout=60)  # until the process lets go of both
    assert out == ("" if launched else "on its own\n")
    assert error.startswith("ended: the launcher of this process is gone") == launched and error.count("\n") == launched
