"""Fixtures shared by the tests of `entropy_core`."""

from __future__ import annotations

import pytest

from tests.oracle.enumeration import CompletionSpace, ExactPolicy, enumerate_completions, solve
from tests.oracle.model_cases import CASES, ModelCase
from tests.oracle.policy import DYADIC_TASK, RECURRENT_TASK, DyadicPolicy, RecurrentPolicy


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> ModelCase:
    """Every model of the table, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def policy() -> RecurrentPolicy:
    return RecurrentPolicy()


@pytest.fixture(scope="session")
def space() -> CompletionSpace:
    return enumerate_completions(RECURRENT_TASK)


@pytest.fixture(scope="session")
def exact(policy: RecurrentPolicy, space: CompletionSpace) -> ExactPolicy:
    return solve(policy, space)


@pytest.fixture(scope="session")
def dyadic_policy() -> DyadicPolicy:
    return DyadicPolicy()


@pytest.fixture(scope="session")
def dyadic_exact(dyadic_policy: DyadicPolicy) -> ExactPolicy:
    return solve(dyadic_policy, enumerate_completions(DYADIC_TASK))
