"""The oldest TRL release that pyproject.toml allows: the probe and the trainer at the range's other end."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CASES = [
    "tests/rl_training/integrations/test_trl_integration.py::test_every_loss_is_predicted[grpo]",
    "tests/rl_training/integrations/test_trl_integration.py::test_every_loss_is_predicted[dapo]",
    "tests/rl_training/integrations/test_trl_integration.py::test_training_is_bit_identical_with_and_without",
    "tests/rl_training/algs/test_dr_grpo.py",
]


def oldest_release() -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    (requirement,) = (r for r in extras if r.startswith("trl"))
    found = re.search(r">=([\d.]+)", requirement)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def oldest_trl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    version = oldest_release()
    exact = version if version.count(".") == 2 else f"{version}.0"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"trl=={exact}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0 and "No matching distribution" not in done.stderr:
        pytest.skip("no package index within reach")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_probe_and_trainer_at_the_oldest_release(oldest_trl):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(oldest_trl), str(ROOT)])}
    asked = subprocess.run(
        [sys.executable, "-c", "import trl; print(trl.__version__)"],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert asked.stdout.strip().startswith(oldest_release()), "another TRL than the oldest is being tested"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
