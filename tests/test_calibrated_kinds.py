"""Every error, interval, p-value and decision that the packages make has its check in the calibration's results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.calibration_kinds import COVERED, EXEMPT
from tests.calibrated_sites import sites

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results/calibration"


def checks() -> set[str]:
    rates, training = (json.loads((RESULTS / name).read_text()) for name in ("rates.json", "training.json"))
    tables = [*rates["worlds"][""].values(), *training["settings"].values()]
    return {name for table in tables for name in table} | set(rates["tests"])


def test_every_function_that_makes_an_error_is_named_with_its_check() -> None:
    found = sites()
    assert len(found) > 60, "the list is made from the code"
    missing = sorted(found - COVERED.keys() - EXEMPT.keys())
    assert not missing, f"name the check of calibration that stands for them in calibration_kinds.py: {missing}"
    stale = sorted((COVERED.keys() | EXEMPT.keys()) - found)
    assert not stale, f"no such function makes an error any more: {stale}"


def test_every_check_that_is_named_was_simulated() -> None:
    known = checks()
    lacking = {wanted for names in COVERED.values() for wanted in names if not any(k.startswith(wanted) for k in known)}
    assert not lacking, f"not in benchmarks/results/calibration: {sorted(lacking)}"


def test_a_new_interval_without_a_check_is_seen(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "entropy_experiments"
    package.mkdir()
    (package / "new.py").write_text(
        "from rl_training.intervals import interval as ends\n\n\ndef told(value):\n    return ends(value, 1.0, 3)\n"
    )
    monkeypatch.setattr("tests.calibrated_sites.ROOT", tmp_path)
    assert sites() == {"new.told"}
