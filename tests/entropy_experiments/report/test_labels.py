"""Labels say what a number is of."""

from dataclasses import replace

import pytest

from entropy_experiments.compare.differences import settings_that_differ
from entropy_experiments.records.preconditioner_labels import of_shares, preconditioner_labels
from entropy_experiments.report.tables import provenance_rows
from tests.entropy_experiments.planted_run import planted_run


@pytest.mark.parametrize(
    ("attribution", "shares", "kernel"),
    [
        ({"preconditioner": "step", "kernel_preconditioner": "checkpoint"}, "step", "checkpoint"),
        (
            {"preconditioner": "checkpoint"},
            "step",
            "checkpoint",
        ),  # as it was written: the kernel's, on shares made with P_t
        ({"preconditioner": "none"}, "none", "none"),
        ({"preconditioner": "something else"}, None, "something else"),
        ({}, None, None),
    ],
)
def test_shares_are_labelled_with_the_p_they_are_made_with(attribution, shares, kernel):
    assert preconditioner_labels({"attribution": attribution}) == (shares, kernel)
    rows = dict(provenance_rows({}, {"attribution": attribution}))
    if shares == "step":
        assert "P_t" in rows["P of shares and step"] and "checkpoint" in rows["P of the kernel"]


def test_every_preconditioning_has_a_label_for_its_shares():
    assert [of_shares(name) for name in ("checkpoint", "step", "none")] == ["step", "step", "none"]


def test_comparisons_name_both():
    def folder(kernel):
        (found,), _ = planted_run(1)
        step = found.summary.attribution.model_copy(update={"kernel_preconditioner": kernel})
        return replace(found, summary=found.summary.model_copy(update={"attribution": step}))

    (row,) = settings_that_differ([folder("step"), folder("checkpoint")])
    assert row == ("attribution.preconditioner of the kernel", ["step", "checkpoint"])
