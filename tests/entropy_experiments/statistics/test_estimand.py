"""What follows from drawn or given evaluation sequences, held against where it comes from."""

from __future__ import annotations

from typing import get_args

from entropy_core.entropy import ESTIMATORS
from entropy_experiments.kernel.contraction import PARTS, STEP_VECTORS
from entropy_experiments.statistics.estimand import GIVEN_TOKENS, POLICY, Estimand, Measure, measure_of
from entropy_experiments.step.numbers import MeasuredScale


def test_the_policys_estimand_has_every_estimator_and_given_texts_have_their_own_alone() -> None:
    assert set(POLICY.estimators) == set(ESTIMATORS), "an estimator that is new to entropy_core predicts as well"
    assert Estimand.of(True) is POLICY and Estimand.of(False) is GIVEN_TOKENS
    assert GIVEN_TOKENS.estimators == ("fixed_prefix",)
    for estimand in (POLICY, GIVEN_TOKENS):
        assert {estimand.gradient, estimand.derivative} <= set(estimand.estimators)
        assert measure_of(estimand.derivative) == measure_of(estimand.gradient) == estimand.measure


def test_measures_are_fields_of_what_is_measured() -> None:
    assert set(get_args(Measure)) <= set(MeasuredScale.__dataclass_fields__)


def test_the_steps_vectors_are_its_parts_and_one_more() -> None:
    assert STEP_VECTORS[: len(PARTS)] == PARTS and len(set(STEP_VECTORS)) == len(PARTS) + 1
