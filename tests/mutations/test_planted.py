"""The table of planted faults is of today's sources: each stands once where it says, and changes it."""

from pathlib import Path

import pytest

from tests.mutations.planted import FAULTS

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_is_changed_stands_there_once(fault) -> None:
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1 and fault.new != fault.old
    compile(text.replace(fault.old, fault.new), fault.file, "exec")
    assert fault.tests and all((ROOT / name).exists() for name in fault.tests)
