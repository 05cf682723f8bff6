"""Two gloo processes train one policy: whole groups a process, one record of all sequences, one checkpoint, one probe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rl_training.configuration import dump_config
from rl_training.run.rollouts import read_rollouts
from rl_training.run.sidecar import read_sidecar
from tests.oracle.comparison import assert_close
from tests.rl_training.shared_probe import all_that_the_probe_says
from tests.tiny_policy import tiny_train_config
from tests.two_processes import in_two_processes


@pytest.mark.long
def test_two_processes_predict_and_measure_what_one_does():
    """On the same batch and the same steps, each process computing on some of the prompts: to 1e-5, in fact to rounding."""
    alone, (first, second) = all_that_the_probe_says(), in_two_processes(all_that_the_probe_says)
    for setting, steps in alone.items():
        for number, wanted in enumerate(steps):
            for found in (first[setting][number], second[setting][number]):
                assert found.keys() == wanted.keys(), setting
                for name, value in wanted.items():
                    where = f"{name} of step {number}, {setting}"
                    assert torch.equal(first[setting][number][name], found[name]), f"{where}: the processes disagree"
                    if float(value.norm()) > 1e-12:
                        assert_close(found[name], value, 1e-5, f"{where} differs from one process")
                    else:
                        assert float(found[name].norm()) <= 1e-12, where
    assert {"predicted", "measured", "batch", "momentum", "predicted_se"} <= alone["default, five prompts"][0].keys()
    assert alone["everything, five prompts"][2]["shares"].shape == (8,)


@pytest.mark.long
def test_two_processes_fill_one_buffer(tiny_policy, tmp_path):
    config = tiny_train_config(
        tiny_policy,
        tmp_path / "run",
        optimizer={"micro_batch_size": 8},
        entropy_probe={"mode": "simple", "preset": "accurate", "eval_sequences": 8},
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
    premise = sidecar.gradient_premise
    assert premise is not None and premise.made and premise.trouble is None
    assert premise.relative_error < 1e-5, "the gradient is the mean over processes, the weights are of all sequences"
    assert sidecar.witness is not None
    for step in (1, 2):
        rows = read_rollouts(tmp_path / "run", step)
        buffer = [row for row in rows if row.status != "rejected"]
        assert {row.rank for row in buffer} == {0, 1} and len(buffer) == 16
        weights = torch.tensor([row.weight for row in buffer], dtype=torch.float64)
        advantages = torch.tensor([row.advantage for row in buffer], dtype=torch.float64)
        torch.testing.assert_close(weights, advantages / (16 * 8), rtol=1e-5, atol=1e-9)
    counted = sum(sidecar.pass_rates["passes"]) + sum(sidecar.pass_rates["failures"])
    assert counted > 0, "pass rates of all processes belong to one table"


TRL_RUN = """
import json, os, sys
from pathlib import Path
from tests.rl_training.integrations.test_trl_integration import train
policy, out, probe = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
trainer, callback = train(policy, out / "run", probe, learning_rate=1e-4, lora=True, per_device_train_batch_size=8,
                          loss_type="dr_grpo", gradient_accumulation_steps=2)
entries = [{k: v for k, v in e.items() if "entropy_probe" in k} for e in trainer.state.log_history if "loss" in e]
shares = [None if c.shares is None else [float(c.shares.sum()), len(c.shares)] for c in callback.history]
(out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({"entries": entries, "shares": shares}))
os._exit(0)  # gloo's threads can abort an interpreter that is being taken apart
"""


@pytest.mark.long
def test_both_ranks_of_a_trl_run_log_the_same_numbers(tiny_policy, tmp_path):
    """Each rank trains on sequences of its own; the probe watches those of both, and both log what it says."""
    probe = {"eval_sequences": 12, "mode": "attribution", "predictors": True}
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    script = tmp_path / "run.py"
    script.write_text(TRL_RUN)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        + [str(tiny_policy), str(tmp_path), json.dumps(probe)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(Path(tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]["entries"]) == 3
    for mine, other in zip(*(rank["entries"] for rank in ranks), strict=True):
        mine.pop("entropy_probe/seconds"), other.pop("entropy_probe/seconds")
        assert mine == other
        same, measured = mine["entropy_probe/same_tokens"], mine["entropy_probe/measured"]
        assert abs(same - measured) < max(0.1 * abs(measured), 5e-7)
        assert mine["entropy_probe/weights_ess"] == 12, "sequences of both ranks, and of one policy"
    for entry, (total, count) in zip(ranks[0]["entries"], ranks[0]["shares"], strict=True):
        assert count == 32, "all sequences of the step, of both ranks and both micro-batches"
        assert total == pytest.approx(entry["entropy_probe/batch"], rel=1e-3, abs=1e-8)
