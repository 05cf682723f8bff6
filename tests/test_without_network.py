"""No command reaches for a network where all that it is given is local: sockets are closed, and nothing misses them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.entropy_experiments.results_fixture import build_results
from tests.entropy_experiments.small_analysis import OFF, SMALL
from tests.tiny_policy import save_tiny_policy, tiny_train_config

_CLOSED = """
import socket, sys
reached = []
def closed(*arguments, **options):
    reached.append(arguments)
    raise OSError("a socket was opened: " + repr(arguments)[:200])
plain = socket.socket
class Closed(socket.socket):
    def connect(self, address):
        return closed(address) if self.family != socket.AF_UNIX else super().connect(address)
    connect_ex = connect
    def sendto(self, *arguments):
        return closed(*arguments) if self.family != socket.AF_UNIX else super().sendto(*arguments)
socket.socket, socket.getaddrinfo, socket.create_connection = Closed, closed, closed
from entropy_experiments.cli import main
sys.argv[0] = "entropy-experiments"
try:
    main()
finally:
    print("REACHED", reached, file=sys.stderr)
"""


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user starts it: no word in the environment keeps the libraries off the network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "WANDB"))}
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.run(
        [sys.executable, "-c", _CLOSED, *map(str, arguments)], env={**kept, "PYTHONPATH": root}, capture_output=True,
        text=True, timeout=500,
    )  # fmt: skip


def assert_alone(done: subprocess.CompletedProcess[str]) -> None:
    assert "REACHED []" in done.stderr, done.stderr[-2000:]
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with their checkpoints, trained without a network."""
    from rl_training.configuration import dump_config

    folder = tmp_path_factory.mktemp("offline")
    config = tiny_train_config(
        save_tiny_policy(folder / "policy"), folder / "run", task={"reward": "default"},
        training={"steps": 3, "save_every": 1},
    )  # fmt: skip
    (folder / "train.yaml").write_text(dump_config(config))
    assert_alone(command("train", folder / "train.yaml", "--quiet"))
    return folder / "run"


_FEW = [*SMALL, *(f"entropy_analysis.analysis.{name}=false" for name in OFF)]


@pytest.mark.long
def test_train_analyze_and_doctor(run: Path, tmp_path: Path) -> None:
    assert_alone(command("doctor", run))
    kept = ["entropy_analysis.sampling.train_prompts=from_run", f"output_dir={tmp_path / 'results'}"]
    assert_alone(command("analyze", run, "--quiet", *_FEW, *kept))


@pytest.mark.long
def test_sweep_price_ledger_and_audit(run: Path, tmp_path: Path) -> None:
    assert_alone(command("sweep", run, "--quiet", "--folder", tmp_path / "sweep", "checkpoints.steps=[2,3]", *_FEW))
    assert_alone(command("price", run, "--quiet", *_FEW, f"output_dir={tmp_path / 'results'}"))
    assert_alone(command("ledger", run, "--quiet", "--sequences", "8"))
    assert_alone(command("audit", run))


@pytest.mark.long
def test_import(run: Path, tmp_path: Path) -> None:
    """A checkpoint of the Trainer as any other trainer leaves it."""
    source = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    (source / "entropy_experiments.json").unlink()
    assert_alone(command("doctor", source))
    assert_alone(command("import", source, "--output", tmp_path / "imported"))


@pytest.mark.long
def test_report_and_compare(tmp_path: Path) -> None:
    one, other = (build_results(tmp_path / name, seed) for seed, name in enumerate("ab"))
    assert_alone(command("report", one))
    assert_alone(command("compare", one, other, "--output", tmp_path / "compared", "--quiet"))


def test_the_sockets_are_closed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CLOSED.split("from entropy_experiments")[0] + "socket.create_connection(('127.0.0.1', 9))"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and "a socket was opened" in done.stderr
