"""`audit` on real TRL runs: a right log agrees everywhere, and each planted mistake is found and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from entropy_experiments.audit.audit import audit_recorded, audit_run
from entropy_experiments.audit.lines import verdict_line
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import read_run
from entropy_experiments.audit.verdicts import AGREES, DIFFERS, RECOMPUTED
from rl_training.integrations.step_recorder import record_steps
from tests.entropy_experiments.audit.conftest import SETTINGS
from tests.rl_training.integrations.test_trl_integration import make_trainer


@pytest.fixture(scope="module")
def policies(planted):
    return Policies(read_run(planted.run), "cpu")


def with_log(policies, change):
    """The audit of the run as if its log said otherwise: change(row) -> new values."""
    run = read_run(policies.run.folder)
    log = [{**row, **change(row)} if "entropy" in row else row for row in run.log]
    return audit_recorded(replace(run, log=log), policies)


def entropies(audit, metric="entropy"):
    return [f for f in audit.findings if f.metric == metric]


def test_a_right_log_agrees_in_everything(planted, policies) -> None:
    audit = with_log(policies, lambda row: {})
    held = [f for f in audit.findings if f.status != RECOMPUTED]
    assert audit.agrees and not audit.unaudited and {f.status for f in held} == {AGREES} and len(held) == 4 * 14
    assert all(f.why == "" for f in held)
    # Not the tolerance alone: the recomputation is the trainer's number.
    assert max(abs(f.difference) for f in entropies(audit)) < 3e-6
    for f in entropies(audit):
        assert f.recomputed == pytest.approx(planted.mean("right", f.step, f.step), abs=3e-6)
    assert "all 56 logged numbers" in verdict_line(audit)


KINDS = {
    "surprisal": "surprisal",
    "temperature_1": "at temperature 1 in place of the sampling temperature 0.7",
    "temperature_0.55": "at temperature 0.55",
    "temperature_0.5523": "at temperature 0.5523",
    "sequence_means": "mean of each sequence's mean",
    "padding": "padding is counted, with the entropy predicted at it",
    "padding_as_zero": "padding is counted, as zeros",
    "without_eos": "the end-of-sequence token is left out",
    "without_first": "the first token of each completion is left out",
    "terminated": "truncated sequences are left out",
    "filtered": "over the filtered batch alone",
    "bf16": "computed in bfloat16",
    "after": "under the policy after the step",
    "stale": "under the policy one step earlier",
    "late": "one position late",
    "bits": "in bits",
    "perplexity": "exponential",
    "per_completion": "sum per completion",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_mistake_is_named(planted, policies, kind: str) -> None:
    """And no other cause is: wherever it changes the number beyond its precision, the same one is found."""

    def change(row):
        value = planted.mean(kind, row["step"], row["step"])
        return {"entropy": value} if value == value else {}

    audit = with_log(policies, change)
    wrong = [f for f in entropies(audit) if f.status != AGREES]
    assert len(wrong) >= 2 and {f.status for f in wrong} == {DIFFERS}
    expected = {KINDS[kind]} | ({"divided by max_completion_length"} if kind == "padding_as_zero" else set())
    for f in wrong:
        causes = f.why.removeprefix("one of these, which the numbers cannot tell apart: ").split("; ")
        assert all(any(e in cause for e in expected) for cause in causes), f.why
    assert not any(f.status != AGREES for f in audit.findings if f.metric != "entropy" and f.logged is not None)


def test_a_trainer_that_logs_surprisal(audited_policy, tmp_path) -> None:
    """The mistake in the trainer itself, with TRL's own logging: what it takes for entropies are surprisals."""
    trainer = make_trainer(audited_policy, tmp_path / "run", **{**SETTINGS, "max_steps": 2})
    original = trainer._get_per_token_logps_and_entropies

    def mistaken(*args, **kwargs):
        logps, entropies, aux = original(*args, **kwargs)
        return logps, None if entropies is None else -logps.detach(), aux

    trainer._get_per_token_logps_and_entropies = mistaken
    record_steps(trainer)
    trainer.train()
    audit = audit_run(tmp_path / "run", "cpu")
    assert [(f.status, f.why) for f in entropies(audit)] == [
        (DIFFERS, "surprisal (−log π of the tokens drawn) in place of entropy")
    ] * 2
    assert "NOT" not in verdict_line(audit) and verdict_line(audit).startswith("2 of 26 logged numbers differ")


@pytest.mark.parametrize(
    ("kind", "both"),
    [
        ("surprisal_of_sequences", ("surprisal", "mean of each sequence's mean")),
        ("surprisal_at_1", ("surprisal", "at temperature 1")),
    ],
)
def test_two_mistakes_at_once(planted, policies, kind: str, both: tuple[str, str]) -> None:
    audit = with_log(policies, lambda row: {"entropy": planted.mean(kind, row["step"], row["step"])})
    assert all(f.status == DIFFERS and all(part in f.why for part in both) for f in entropies(audit))
    assert all("cannot tell apart" not in f.why for f in entropies(audit))
