"""Files of earlier versions: checkpoints' records stay readable, results folders open or are refused in one line with a remedy.

tests/resources/formats: what two commits of version 0.1.0 wrote of the tests' tiny run. 0.1.0-early is be4ef0b's parent (record
of format 1, results of the first typed format's forerunner), 0.1.0-last the last commit before 0.2.0 (both of format 2).
"""

from pathlib import Path

import pytest

from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.report.outcome import analysis_outcome
from rl_training.errors import UserError
from rl_training.run.sidecar import read_sidecar
from tests.test_wheel import project_version

STORED = Path(__file__).parent / "resources" / "formats"


@pytest.mark.parametrize(("kept", "number"), [("0.1.0-early", 1), ("0.1.0-last", 2)])
def test_records_of_checkpoints_stay_readable(kept: str, number: int) -> None:
    record = read_sidecar(STORED / kept / "checkpoint-2")
    assert record is not None and record.format == number
    assert record.step == 2 and record.learning_rates_used == [1e-3, 1e-3]
    assert record.sampling.max_completion_length == 8 and record.algorithm.scheme == "dr_grpo"
    assert (record.witness is not None) == (number == 2), "what a format did not have is absent, not made up"


def test_a_results_folder_of_the_present_format_opens() -> None:
    results = read_results_folder(STORED / "0.1.0-last" / "results")
    assert results.summary.format_version == 2 and len(results.training) == len(results.evaluation) == 16
    outcome = analysis_outcome(results)
    assert outcome.predicted.value == results.summary.prediction.total.value is not None
    assert not outcome.checks.failed and results.kernels["fisher"].shape == (16, 16)


def test_a_results_folder_of_an_older_shape_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as refusal:
        read_results_folder(STORED / "0.1.0-early" / "results")
    words = str(refusal.value)
    assert "\n" not in words and "summary.json" in words and "run `entropy-experiments analyze` again" in words


def test_versions_that_are_kept_are_older_than_this_one() -> None:
    """A release with a new format keeps files of the one before: docs/releasing.md."""
    present = tuple(map(int, project_version().split(".")))
    kept = [tuple(map(int, folder.name.split("-")[0].split("."))) for folder in STORED.iterdir() if folder.is_dir()]
    assert kept and max(kept) < present
