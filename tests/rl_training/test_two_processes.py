"""Two gloo processes train one policy: whole groups a process, one record of all sequences, one checkpoint."""

import os
import subprocess
import sys

import pytest
import torch

from rl_training.algs.rollout_record import read_rollouts
from rl_training.checkpoint_format import read_sidecar
from rl_training.configuration import dump_config
from tests.tiny_policy import tiny_train_config


@pytest.mark.slow
def test_two_processes_fill_one_buffer(tiny_policy, tmp_path):
    config = tiny_train_config(
        tiny_policy, tmp_path / "run", optimizer={"micro_batch_size": 8}, entropy_probe={"eval_sequences": 8}
    )
    (tmp_path / "train.yaml").write_text(dump_config(config))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + ["-m", "entropy_experiments", "train", str(tmp_path / "train.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(tmp_path / "run"), "printed once, by the main process"
    sidecar = read_sidecar(tmp_path / "run" / "checkpoint-2")
    assert sidecar is not None and sidecar.rank_count == 2
    for step in (1, 2):
        rows = read_rollouts(tmp_path / "run", step)
        buffer = [row for row in rows if row["status"] != "rejected"]
        assert {row["rank"] for row in buffer} == {0, 1} and len(buffer) == 16
        weights = torch.tensor([row["weight"] for row in buffer], dtype=torch.float64)
        advantages = torch.tensor([row["advantage"] for row in buffer], dtype=torch.float64)
        torch.testing.assert_close(weights, advantages / (16 * 8), rtol=1e-5, atol=1e-9)
    counted = sum(sidecar.pass_rates["passes"]) + sum(sidecar.pass_rates["failures"])
    assert counted > 0, "pass rates of all processes belong to one table"
