"""The quick part of `make faults`, and that the harness sees what is not as it must be."""

import shutil
from pathlib import Path

import pytest

from entropy_experiments.records.folder_files import written_data
from rl_training.errors import UserError
from rl_training.run.sums import write_sums
from tests.entropy_experiments.results_fixture import build_results
from tests.faults import configurations, models, texts
from tests.faults.cases import EITHER, Case, run_case
from tests.faults.damaged_files import results_cases
from tests.faults.interruptions import point_cases
from tests.faults.launches import kill_cases
from tests.faults.undisturbed import Undisturbed, commands


def _raise(error: BaseException) -> None:
    raise error


def troubles(cases) -> list[str]:
    found = [outcome for outcome in map(run_case, cases) if outcome.trouble]
    return [f"{o.case.area}, {o.case.name}: {o.trouble}: {o.said}" for o in found]


def test_the_harness_tells_what_must_not_be() -> None:
    bad = [
        Case("a", "taken", lambda folder: None),
        Case("a", "a traceback", lambda folder: _raise(KeyError("x"))),
        Case("a", "an exit", lambda folder: _raise(SystemExit(0))),
        Case("a", "two lines", lambda folder: _raise(UserError("x\ny"))),
        Case("a", "another line", lambda folder: _raise(UserError("x")), "name"),
    ]
    assert len(troubles(bad)) == len(bad)
    good = [
        Case("a", "refused", lambda folder: _raise(UserError("name"))),
        Case("a", "taken", lambda folder: None, "", EITHER),
    ]
    assert not troubles(good)


@pytest.mark.long
@pytest.mark.parametrize("command", configurations.CONFIGURATIONS)
def test_configurations(command: str) -> None:
    cases = [case for case in configurations.cases() if case.area.endswith(f" {command}")]
    assert len(cases) > 400 and not troubles(cases[:: 1 if command == "train" else 4])


def test_lines_of_ones_own() -> None:
    assert not troubles(texts.cases())


def test_rewards_of_ones_own() -> None:
    cases = list(models.reward_cases())
    assert len(cases) > 20 and not troubles(cases)


@pytest.mark.long
def test_models(tiny_policy: Path) -> None:
    assert not troubles(models.model_cases(tiny_policy))


def test_results(tmp_path: Path) -> None:
    folder = build_results(tmp_path / "results")
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "evaluation_set.json").write_text("{}")
    (folder / "leave_one_out.parquet").write_bytes(b"PAR1")
    write_sums(folder, written_data(folder))
    cases = list(results_cases(folder))
    assert len(cases) > 100 and not troubles(cases[::3])


@pytest.mark.long
def test_interruptions(tiny_policy: Path, tmp_path: Path) -> None:
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")  # the task is written beside it
    sound = Undisturbed(commands(policy, tmp_path, tmp_path, tmp_path), tmp_path)
    assert not troubles([*point_cases(sound, "train", "kill", 4), *point_cases(sound, "train", "full", 2)])
    assert not troubles(kill_cases(sound, "train", 2, 2))
