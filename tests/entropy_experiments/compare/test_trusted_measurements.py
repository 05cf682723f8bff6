"""What a comparison says of measured changes that are not to be trusted."""

import pytest

from entropy_experiments.compare.differences import compare_sides
from entropy_experiments.compare.sides import caveats, open_sides
from entropy_experiments.compare.verdict import comparison_verdict
from tests.entropy_experiments.comparison_fixture import build_side, edit_summary


@pytest.fixture
def pair(tmp_path):
    """Two analyses on the same prompts."""
    return build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, shift=0.05)


def test_measurements_that_are_not_to_be_trusted_differ_by_no_more_than_can_be_said(pair):
    """Their errors are not known; the paired error of their difference was given, and the difference claimed."""
    assert compare_sides(open_sides(pair))[-1].row("measured").differences[1].differs_from_zero is not None
    edit_summary(pair[1], lambda s: s["actual"]["snis"].update(trustworthy=False, low=None, high=None))
    gap = compare_sides(open_sides(pair))[-1].row("measured").differences[1]
    assert gap.differs_from_zero is None and gap.number.standard_error is None and "not to be trusted" in gap.reason
    sides = open_sides(pair)
    points = compare_sides(sides)
    first = comparison_verdict(sides, points, caveats(sides, points[-1].analyses))[0]
    assert "whether that is more than chance cannot be said" in first.text and first.tone == "warning"
