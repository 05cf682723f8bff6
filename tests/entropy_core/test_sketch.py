"""Sketches keep inner products on average, and exactly where nothing is projected."""

from __future__ import annotations

import pytest
import torch

from entropy_core.sketch import ModuleSketch

SHAPES = {
    "wide": torch.Size([8, 40]),
    "tall": torch.Size([60, 4]),
    "vector": torch.Size([5]),
    "small": torch.Size([2, 3]),
}


def rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in SHAPES.items()}


def sketched(sketch: ModuleSketch, given: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.zeros(len(next(iter(given.values()))), sketch.size)
    for name, part in given.items():
        sketch.add(out, name, part)
    return out


def exact(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([left[name].flatten(1) @ right[name].flatten(1).T for name in left]).sum(0)


def test_the_mean_over_projections_is_the_inner_product() -> None:
    left, right = rows(3, 1), rows(4, 2)
    right = {name: part + left[name][:1] for name, part in right.items()}
    found = torch.stack(
        [sketched(s, left) @ sketched(s, right).T for s in (ModuleSketch(SHAPES, 16, seed) for seed in range(600))]
    )
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact(left, right)).abs() < 4.5 * error).all()), "biased"


def test_errors_shrink_with_the_dimension() -> None:
    left, right = rows(20, 1), rows(30, 2)
    wanted = exact(left, right)
    errors = [
        torch.stack(
            [
                (sketched(s, left) @ sketched(s, right).T - wanted).norm()
                for s in (ModuleSketch(SHAPES, dim, seed) for seed in range(20))
            ]
        ).mean()
        for dim in (4, 16, 64)
    ]
    assert errors[0] > 1.3 * errors[1] > 1.5 * errors[2]


def test_a_dimension_that_saves_nothing_is_exact() -> None:
    left, right = rows(3, 1), rows(4, 2)
    sketch = ModuleSketch(SHAPES, 10_000)
    torch.testing.assert_close(sketched(sketch, left) @ sketched(sketch, right).T, exact(left, right))


def test_sizes_and_seeds() -> None:
    sketch = ModuleSketch(SHAPES, 16, seed=3)
    assert sketch.size <= 16 + 16 + 5 + 6
    given = rows(2, 1)
    assert torch.equal(sketched(sketch, given), sketched(ModuleSketch(SHAPES, 16, seed=3), given))
    assert not torch.equal(sketched(sketch, given), sketched(ModuleSketch(SHAPES, 16, seed=4), given))
    with pytest.raises(ValueError, match="at least one number"):
        ModuleSketch(SHAPES, 0)
