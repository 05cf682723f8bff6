"""Labels say what a number is of."""

from dataclasses import replace

from entropy_experiments.compare.differences import settings_that_differ
from entropy_experiments.records.preconditioner_labels import of_shares
from entropy_experiments.report.tables import provenance_table
from tests.entropy_experiments.planted_run import planted_run


def test_shares_are_labelled_with_the_p_they_are_made_with():
    (found,), _ = planted_run(1)
    rows = dict(provenance_table(found.run, found.summary).rows)
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
