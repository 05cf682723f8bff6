"""`price` as a person types it: the list on the terminal and as JSON, and what it refuses."""

import json

import pytest

from entropy_experiments.console.price import price_config
from tests.entropy_experiments.console.test_cli import assert_one_clear_line, run

FEW = ["entropy_analysis.eval_batch_size=8", "entropy_analysis.train_batch_size=8", "checkpoint.device=cpu"]


@pytest.mark.long
def test_the_list_is_printed_and_kept(tiny_run, tmp_path):
    asked = ("price", tiny_run, *FEW, f"output_dir={tmp_path}", "--trust")
    done = run(*asked, "--json", "--measure")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["command"] == "price" and found["report"].endswith("report.html") and "/prices_" in found["report"]
    assert found["sentence"].startswith("The step as trained is predicted to change entropy by")
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["run"]["measured"] and rows["kl_0.04"]["entropy"], "the base model of the adapter is the reference"
    again = run(*asked)
    assert_one_clear_line(again, "exists already", "--overwrite")
    replaced = run(*asked, "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    assert "half the learning rate: δh " in replaced.stderr and "clip-higher: not priced" in replaced.stderr
    assert replaced.stdout.strip().endswith("report.html")


def test_a_missing_checkpoint_is_one_line(tmp_path):
    assert_one_clear_line(run("price", tmp_path / "nothing"), "does not exist")


def test_prices_are_what_the_command_is_for():
    config = price_config(None, ["entropy_analysis.analysis.prices=false"], measure=False)
    assert config.entropy_analysis.analysis.prices, "settings of another analysis may have turned them off"
