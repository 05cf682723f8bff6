"""Recorded sequences that no run records are refused in one line, whatever their column."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entropy_experiments.entropy_runner import run_fisher_analysis
from rl_training.errors import UserError
from rl_training.run.checkpoint_digests import file_digest
from rl_training.run.rollouts import read_rollouts, rollouts_path
from rl_training.run.sums import add_sum
from tests.entropy_experiments.small_analysis import config

NAN = float("nan")


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def rewrite(run: Path, step: int, **columns: Any) -> None:
    """Every row that was kept with other values; None: without the column."""
    path = rollouts_path(run, step)
    stored = pq.read_table(path).to_pylist()
    rows = [{**row, **(columns if row["status"] != "rejected" else {})} for row in stored]
    pq.write_table(pa.Table.from_pylist(rows), path)
    add_sum(path)
    record = run / f"checkpoint-{step}" / "entropy_experiments.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"rollouts_sha256": file_digest(path)}))


@pytest.mark.parametrize(
    "columns",
    [
        {"weight": NAN}, {"weight": None}, {"weight": float("inf")}, {"weight": "x"}, {"advantage": NAN}, {"prompt_ids": [-1]},
        {"completion_ids": None}, {"completion_ids": ["x"]}, {"completion": 1}, {"reward": "x"}, {"prompt_index": 0.5},
        {"completion_mask": [1]}, {"status": None}, {"completion_mask": [True] * 99}, {"draw_probability": 0.0}, {"round": None},
    ],
)  # fmt: skip
def test_a_value_that_no_run_records(run: Path, columns: dict[str, Any]) -> None:
    rewrite(run, 4, **columns)
    with pytest.raises(UserError, match=f"{next(iter(columns))} holds .*which no run records: it is damaged") as caught:
        read_rollouts(run, 4)
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary(run: Path, tmp_path: Path) -> None:
    rewrite(run, 4, completion_ids=[10**6, 5])
    from_run = config("entropy_analysis.sampling.train_prompts=from_run")
    with pytest.raises(UserError, match="have the token 1000000, the policy has"):
        run_fisher_analysis(run, from_run, folder=tmp_path / "results")


def test_garbage_is_one_line(run: Path) -> None:
    rollouts_path(run, 4).write_bytes(b"PAR1garbage")
    add_sum(rollouts_path(run, 4))
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_rollouts(run, 4)
    assert "\n" not in str(caught.value)
