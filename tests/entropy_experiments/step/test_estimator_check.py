"""The self-check of the estimators: quiet where they are right, loud where a term is lost, doubled or not centred."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from entropy_core.entropy import TokenCoefficients, entropy_coefficients
from entropy_experiments.step import estimator_check

WRONG: dict[str, Callable[[TokenCoefficients], TokenCoefficients]] = {
    "the score term lost": lambda c: replace(c, logprob=0 * c.logprob),
    "the explicit term lost": lambda c: replace(c, entropy=0 * c.entropy),
    "a sign": lambda c: replace(c, logprob=-c.logprob),
    "half as much": lambda c: c.scaled(0.5),
}


def found() -> estimator_check.SelfCheck:
    return estimator_check.check_estimators(torch.device("cpu"))


def test_it_passes_to_rounding() -> None:
    assert found().passed and found().value < 1e-13


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("estimator", ["rao_blackwell", "split"])
def test_a_wrong_coefficient_does_not_pass(wrong: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(statistics, batch, which, per_token, weights) -> TokenCoefficients:
        right = entropy_coefficients(statistics, batch, which, per_token, weights)
        return WRONG[wrong](right) if which == estimator else right

    monkeypatch.setattr(estimator_check, "entropy_coefficients", planted)
    assert found().value > 0.01 and not found().passed
