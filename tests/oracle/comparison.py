"""Relative errors, and a message that names the mistake a wrong number looks like."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def _float64(value: Tensor | float) -> Tensor:
    return value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def relative_error(actual: Tensor | float, expected: Tensor | float) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite where only one of the two is zero or a value is
    not finite."""
    a, b = _float64(actual), _float64(expected)
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return float("inf")
    difference, size = float((a - b).norm()), float(b.norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def cosine(actual: Tensor, expected: Tensor) -> float:
    """Cosine of two flat vectors in float64."""
    a, b = actual.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    return float(a @ b / (a.norm() * b.norm()))


def diagnosis(actual: Tensor | float, suspects: Mapping[str, Tensor | float], tolerance: float = 1e-4) -> str:
    """Which of the known wrong answers `actual` equals, in words; or what its ratio to each would be."""
    for mistake, value in suspects.items():
        if relative_error(actual, value) <= tolerance:
            return f"it equals the wrong answer of this mistake: {mistake}"
    return "it equals none of the known wrong answers: " + "; ".join(suspects)


def assert_close(
    actual: Tensor | float,
    expected: Tensor | float,
    tolerance: float,
    smell: str,
    suspects: Mapping[str, Tensor | float] | None = None,
) -> None:
    """Fail where the relative error exceeds `tolerance`, saying what it smells like.

    `suspects` maps a mistake to the number that it would give; each must differ from the expected number by
    more than the tolerance, or the test could not tell the two apart, which is a failure of the test itself.
    """
    for mistake, value in (suspects or {}).items():
        gap = relative_error(value, expected)
        assert gap > 10 * tolerance, f"the test is blind to this mistake: {mistake} (it would show {gap:.1e})"
    error = relative_error(actual, expected)
    shapes = f"shapes {tuple(_float64(actual).shape)} and {tuple(_float64(expected).shape)}"
    hint = f"; {diagnosis(actual, suspects)}" if suspects else ""
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e} ({shapes}). {smell}{hint}"


def assert_named_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, smell: str
) -> None:
    """Compare named tensors: the same names, and each tensor close on the scale of the whole.

    A tensor is held to `tolerance` times the larger of its own norm and a thousandth of the whole's norm:
    some gradients are zero for a reason (a key bias under softmax), and rounding there has no scale of its
    own.
    """
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    assert not missing and not extra, f"parameters missing {missing[:4]}, unexpected {extra[:4]}. {smell}"
    whole = float(torch.stack([tensor.double().norm() for tensor in expected.values()]).norm())
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape, (
            f"{name}: shape {tuple(actual[name].shape)}, expected {tuple(reference.shape)}. {smell}"
        )
        difference = float((actual[name].double() - reference.double()).norm())
        bound = tolerance * max(float(reference.double().norm()), 1e-3 * whole)
        assert difference <= bound, f"{name}: difference {difference:.2e} > {bound:.2e}. {smell}"
