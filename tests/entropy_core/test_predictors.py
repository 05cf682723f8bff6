"""The literature's predictors against a table of logits: every action enumerated, every step really taken, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_core.predictors import (
    covariance_predictor,
    steer_predictor,
    steer_token_changes,
)

RATE = 0.3
# Sixteenths, so that a batch of sixteen one-token completions *is* the distribution.
SIXTEENTHS = [8, 4, 2, 1, 1]
VALUES = [2.0, -1.0, 1.5, 4.0, -3.0]


def entropy_of(logits: list[float]) -> float:
    """Entropy of softmax(logits), nats, by hand."""
    largest = max(logits)
    total = sum(math.exp(z - largest) for z in logits)
    chances = [math.exp(z - largest) / total for z in logits]
    return -sum(p * math.log(p) for p in chances if p > 0)


def slope(logits: list[float], direction: list[float], step: float = 1e-5) -> float:
    """dH along `direction`, by a central difference."""
    ahead = [z + step * d for z, d in zip(logits, direction, strict=True)]
    behind = [z - step * d for z, d in zip(logits, direction, strict=True)]
    return (entropy_of(ahead) - entropy_of(behind)) / (2 * step)


@pytest.fixture
def chances() -> list[float]:
    return [count / 16 for count in SIXTEENTHS]


@pytest.fixture
def logits(chances: list[float]) -> list[float]:
    return [math.log(p) + 0.7 for p in chances]  # any constant: softmax does not see it


@pytest.fixture
def centred(chances: list[float]) -> list[float]:
    """An advantage of mean zero under the policy."""
    mean = sum(p * a for p, a in zip(chances, VALUES, strict=True))
    return [a - mean for a in VALUES]


@pytest.fixture
def batch(chances: list[float], centred: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropies, mask, advantages): action a stands 16 pi(a) times, in the second of three columns."""
    actions = [a for a, count in enumerate(SIXTEENTHS) for _ in range(count)]
    mask = torch.zeros(16, 3, dtype=torch.bool)
    mask[:, 1] = True
    logprobs = torch.full((16, 3), 77.0, dtype=torch.float64)  # rubbish where nobody may look
    logprobs[:, 1] = torch.tensor([math.log(chances[a]) for a in actions], dtype=torch.float64)
    entropies = torch.full((16, 3), -55.0, dtype=torch.float64)
    entropies[:, 1] = entropy_of([math.log(p) for p in chances])
    return logprobs, entropies, mask, torch.tensor([centred[a] for a in actions], dtype=torch.float64)


def expected_policy_gradient(chances: list[float], advantage: list[float]) -> list[float]:
    """d/dz_b sum_a pi_a A_a with every action enumerated: sum_a pi_a A_a (1[a = b] - pi_b)."""
    actions = range(len(chances))
    return [sum(chances[a] * advantage[a] * ((a == b) - chances[b]) for a in actions) for b in actions]


def test_covariance_is_the_first_order_change_of_one_policy_gradient_step(
    batch: tuple[Tensor, ...], logits: list[float], chances: list[float], centred: list[float]
) -> None:
    logprobs, _, mask, advantages = batch
    step = [RATE * g for g in expected_policy_gradient(chances, centred)]
    exact = slope(logits, step)
    assert abs(exact) > 0.04
    assert covariance_predictor(logprobs, mask, advantages, RATE) == pytest.approx(exact, rel=1e-8), (
        "sign, learning rate, or pi missing beside A"
    )


def test_covariance_of_the_natural_gradient(
    batch: tuple[Tensor, ...], logits: list[float], centred: list[float]
) -> None:
    logprobs, _, mask, advantages = batch
    exact = slope(logits, [RATE * a for a in centred])
    assert covariance_predictor(logprobs, mask, advantages, RATE, natural_gradient=True) == pytest.approx(
        exact, rel=1e-8
    )


def test_a_real_step_approaches_the_covariance(
    batch: tuple[Tensor, ...], logits: list[float], chances: list[float], centred: list[float]
) -> None:
    """The full change of entropy, not its derivative: the ratio goes to one as the rate shrinks, and linearly so."""
    logprobs, _, mask, advantages = batch
    gradient = expected_policy_gradient(chances, centred)
    errors = []
    for rate in (1e-2, 1e-3):
        moved = [z + rate * g for z, g in zip(logits, gradient, strict=True)]
        change = entropy_of(moved) - entropy_of(logits)
        errors.append(abs(change / covariance_predictor(logprobs, mask, advantages, rate) - 1))
    assert errors[1] < 1e-2
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_pooling_contexts_adds_the_covariance_of_their_means(batch: tuple[Tensor, ...]) -> None:
    """What the docstring says of several contexts, with a second one whose probabilities and advantages are others."""
    logprobs, _, mask, advantages = batch
    other = torch.full_like(logprobs, 0.0)
    other[:, 1] = math.log(1 / 4)
    other_advantages = torch.tensor([2.0, -1.0, 0.5, 3.5] * 4, dtype=torch.float64)
    own = [
        covariance_predictor(logprobs, mask, advantages, 1.0),
        covariance_predictor(other, mask, other_advantages, 1.0),
    ]
    pooled = covariance_predictor(
        torch.cat([logprobs, other]), torch.cat([mask, mask]), torch.cat([advantages, other_advantages]), 1.0
    )
    x = [logprobs[:, 1].mean(), other[:, 1].mean()]
    y = [(logprobs[:, 1].exp() * advantages).mean(), (other[:, 1].exp() * other_advantages).mean()]
    between = float((x[0] - x[1]) * (y[0] - y[1]) / 4)
    assert pooled == pytest.approx(sum(own) / 2 - between, rel=1e-12)


def test_the_covariance_of_ragged_completions_by_hand() -> None:
    """Means are over tokens: the long completion counts three times, the short one once."""
    logprobs = torch.tensor([[9.0, -1.0, -2.0, -3.0], [-6.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[False, True, True, True], [True, False, False, False]])
    advantages = torch.tensor([2.0, -2.0])
    # mean log pi = -12/4 = -3, mean A = (2 + 2 + 2 - 2)/4 = 1: products 2 * 1, 1 * 1, 0 * 1 and -3 * -3
    predicted = covariance_predictor(logprobs, mask, advantages, 0.5, natural_gradient=True)
    assert predicted == pytest.approx(-0.5 * (2 + 1 + 0 + 9) / 4)


def test_steer_is_the_change_from_the_sampled_logit_alone(
    batch: tuple[Tensor, ...], logits: list[float], chances: list[float], centred: list[float]
) -> None:
    logprobs, entropies, mask, advantages = batch
    changes = steer_token_changes(logprobs, entropies, mask, advantages, RATE)
    actions = [a for a, count in enumerate(SIXTEENTHS) for _ in range(count)]
    for row, action in enumerate(actions):
        direction = [0.0] * len(chances)
        direction[action] = RATE * centred[action] * (1 - chances[action])
        assert float(changes[row, 1]) == pytest.approx(slope(logits, direction), rel=1e-7, abs=1e-11), (
            f"action {action}"
        )
    assert not changes[:, [0, 2]].any(), "rubbish off the completion got in"


def test_what_steer_leaves_out_is_the_move_of_the_other_logits(
    batch: tuple[Tensor, ...], logits: list[float], chances: list[float], centred: list[float]
) -> None:
    """The docstring's last formula: with it, the token's full gradient A (e_a - pi) is accounted for."""
    logprobs, entropies, mask, advantages = batch
    changes = steer_token_changes(logprobs, entropies, mask, advantages, RATE)
    actions = [a for a, count in enumerate(SIXTEENTHS) for _ in range(count)]
    h = entropy_of(logits)
    for row, action in enumerate(actions):
        full = [RATE * centred[action] * ((b == action) - p) for b, p in enumerate(chances)]
        rest = sum(p**2 * (math.log(p) + h) for b, p in enumerate(chances) if b != action)
        predicted = float(changes[row, 1]) + RATE * centred[action] * rest
        assert predicted == pytest.approx(slope(logits, full), rel=1e-7, abs=1e-11)


def test_steer_averages_over_tokens_not_over_sequences() -> None:
    logprobs = torch.log(torch.tensor([[0.5, 0.5, 0.5], [0.25, 1.0, 1.0]], dtype=torch.float64))
    entropies = torch.full((2, 3), 1.0, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([1.0, -1.0])
    half = -1.0 * 0.5 * 0.5 * (math.log(0.5) + 1)
    quarter = 1.0 * 0.25 * 0.75 * (math.log(0.25) + 1)
    expected = 0.1 * (3 * half + quarter) / 4
    assert steer_predictor(logprobs, entropies, mask, advantages, 0.1) == pytest.approx(expected, rel=1e-12)


def test_steer_of_an_almost_certain_token_keeps_its_digits() -> None:
    """1 - pi is 1e-12 here; formed as a difference in float64 it would have four digits, in float32 none."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    logprobs = torch.full((1, 1), -1e-12, dtype=torch.float64)
    entropies = torch.full((1, 1), 3e-11, dtype=torch.float64)
    found = steer_predictor(logprobs, entropies, mask, torch.ones(1), 1.0)
    assert found == pytest.approx(-1e-12 * 2.9e-11, rel=1e-9, abs=0)


def test_half_precision_input_is_summed_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(40, 50, generator=generator).to(torch.bfloat16)
    mask = torch.rand(40, 50, generator=generator) < 0.8
    advantages = torch.randn(40, generator=generator).to(torch.bfloat16)
    low = covariance_predictor(logprobs, mask, advantages, 1.0)
    assert low == covariance_predictor(logprobs.double(), mask, advantages.double(), 1.0)


def test_no_advantage_moves_nothing(batch: tuple[Tensor, ...]) -> None:
    logprobs, entropies, mask, advantages = batch
    nothing = torch.zeros_like(advantages)
    assert covariance_predictor(logprobs, mask, nothing, RATE) == 0
    assert steer_predictor(logprobs, entropies, mask, nothing, RATE) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "mask": b["mask"].long()}, "mask must be .* bool"),
        (lambda b: {**b, "mask": torch.zeros_like(b["mask"])}, "no completion token"),
        (lambda b: {**b, "advantages": b["advantages"][:-1]}, "16 sequences"),
        (lambda b: {**b, "entropies": b["entropies"][:, :2]}, r"entropies is \(16, 2\)"),
        (lambda b: {**b, "logprobs": b["logprobs"].masked_fill(b["rows"] == 3, -math.inf)}, "logprobs of sequence 3"),
        (
            lambda b: {**b, "advantages": b["advantages"].masked_fill(b["rows"][:, 0] == 5, math.nan)},
            "advantages of .* 5",
        ),
    ],
)
def test_errors_say_what_is_wrong(batch: tuple[Tensor, ...], change, message: str) -> None:  # noqa: ANN001
    arguments = dict(zip(("logprobs", "entropies", "mask", "advantages"), batch, strict=True))
    arguments = change({**arguments, "rows": torch.arange(16)[:, None].expand(16, 3)})
    arguments.pop("rows")
    with pytest.raises(ValueError, match=message):
        steer_predictor(**arguments, learning_rate=RATE)
