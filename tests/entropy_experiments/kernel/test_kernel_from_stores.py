"""The kernel read back from two stores against the one computed directly, and against float64 sums."""

from __future__ import annotations

import gc
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_core.gradients import entropy_rows, per_sequence_gradients, trainable_parameters
from entropy_core.kernel import compute_kernels
from entropy_experiments.kernel.store import kernel_from_stores as subject
from entropy_experiments.kernel.store.fingerprint import store_fingerprint
from entropy_experiments.kernel.store.kernel_from_stores import TilePlan, kernel_from_stores, plan_tiles
from entropy_experiments.kernel.store.store import GradientStore
from tests.entropy_core.support import right_padded
from tests.entropy_experiments.store_cases import IDENTITY, fill, in_process, new_store, random_rows, refused
from tests.oracle.model_cases import CASES, ModelCase, random_sequences

ALLOWED = {"float32": None, "float16": 1e-3, "bfloat16": 1e-2}
"""Relative errors of the kernel; float32 is held to its rounding."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def norms(store: GradientStore, p: dict[str, Tensor] | None) -> Tensor:
    """(n,) float64, of the rows in the metric of P: no sum of products is larger than two of these multiplied."""
    squares = (
        (store.module(name).double().square() * (1.0 if p is None else p[name].double())).flatten(1).sum(1)
        for name in store.layout.shapes
    )
    return sum(squares, torch.zeros(())).sqrt()


def random_preconditioner(shapes: dict[str, tuple[int, ...]], seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 10 ** (3 * torch.rand(shape, generator=generator) - 1) for name, shape in shapes.items()}


def in_float64(left: dict[str, Tensor], right: dict[str, Tensor], p: dict[str, Tensor] | None) -> np.ndarray:
    total = np.zeros((len(next(iter(left.values()))), len(next(iter(right.values())))))
    for name in left:
        weights = 1.0 if p is None else p[name].double().numpy().reshape(1, -1)
        sides = [rows[name].double().numpy().reshape(len(rows[name]), -1) for rows in (left, right)]
        total += (sides[0] * weights) @ sides[1].T
    return total


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("base_dtype", ALLOWED)
def test_equals_the_kernel_computed_directly(case: ModelCase, base_dtype: str, tmp_path: Path) -> None:
    model = case.make(torch.float32)
    batches = {"eval": right_padded(random_sequences(case.vocabulary, seed=2)).select([0, 2, 3, 5, 6])}
    batches["train"] = right_padded(random_sequences(case.vocabulary, seed=1))
    p = random_preconditioner({name: parameter.shape for name, parameter in trainable_parameters(model).items()})
    stores = {}
    for kind, side in (("score", "eval"), ("score", "train"), ("entropy", "eval")):
        rows = (per_sequence_gradients if kind == "score" else entropy_rows)(model, batches[side])
        store = new_store(
            tmp_path / f"{side}-{kind}",
            shapes={name: values.shape[1:] for name, values in rows.items()},
            num_grads=len(batches[side]),
            kind=kind,
            base_dtype=base_dtype,
            shard_rows=2,
            fingerprint=store_fingerprint(model, batches[side], kind),
        )
        stores[f"{side}-{kind}"] = fill(store, rows)
    for preconditioner in (p, None):
        direct = compute_kernels(model, batches["eval"], batches["train"], preconditioner)
        for kind, expected in (("score", direct.fisher), ("entropy", direct.entropy_fisher)):
            found = kernel_from_stores(stores[f"eval-{kind}"], stores["train-score"], preconditioner)
            assert found.shape == (5, 7) and found.dtype == torch.float32
            error = relative(found, expected)
            print(f"{case.name} {kind} {base_dtype}: relative error {error:.1e}")
            if base_dtype == "float32":
                # Two float32 sums of the same products, in another order: rounding is of the size of the products.
                scale = norms(stores[f"eval-{kind}"], preconditioner)[:, None] * norms(
                    stores["train-score"], preconditioner
                )
                assert float(((found - expected).abs() / scale).max()) <= 1e-6
            else:
                assert error <= ALLOWED[base_dtype]
                # The rows' own record tells the kernel's error to the order of magnitude.
                assert error < 5 * stores[f"eval-{kind}"].storage_error().relative


def two_stores(folder: Path, n_eval: int = 23, n_train: int = 17, base_dtype: str = "float32") -> list[GradientStore]:
    return [
        fill(new_store(folder / str(seed), num_grads=count, base_dtype=base_dtype), random_rows(count, seed))
        for seed, count in enumerate((n_eval, n_train))
    ]


@pytest.mark.long
@pytest.mark.parametrize("base_dtype", ALLOWED)
@pytest.mark.parametrize(("n_eval", "n_train"), [(23, 17), (5, 30), (30, 5), (1, 1)])
def test_every_way_of_cutting_gives_the_same_kernel(
    n_eval: int, n_train: int, base_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "NARROWEST_BYTES", 4 * 5)
    left, right = two_stores(tmp_path, n_eval, n_train, base_dtype)
    shapes = left.layout.shapes
    p = random_preconditioner(shapes)
    rows = [{name: store.module(name) for name in shapes} for store in (left, right)]
    expected = torch.from_numpy(in_float64(*rows, p))
    plans, fixed = set(), 4 * n_eval * n_train + 4 * left.layout.row_values
    for free in (40, 60, 100, 300, 500, 1000, 2000, 10**6):
        plan = plan_tiles(left, right, True, fixed + free)
        assert 4 * (plan.eval_rows + plan.train_rows) * plan.columns <= free, "the plan breaks its budget"
        plans.add(plan)
        assert relative(kernel_from_stores(left, right, p, fixed + free), expected) < 1e-6
    assert TilePlan(n_eval, n_train, 48) in plans
    assert n_eval == 1 or len(plans) > 4


def test_too_small_a_budget_says_how_much_is_needed(tmp_path: Path) -> None:
    left, right = two_stores(tmp_path)
    needed = 4 * (23 * 17 + 2 * 48)
    with refused(
        f"memory_budget .* GiB is too small: the kernel, P and one row of either side need {needed / 2**30:.3g} GiB"
    ):
        kernel_from_stores(left, right, None, needed - 1)
    assert kernel_from_stores(left, right, None, needed).shape == (23, 17)


def work_within_budget(folder: Path, budget: int, allowed: int) -> None:
    """The peak of resident memory may rise by no more than `allowed` bytes."""
    torch.set_num_threads(1)
    left, right = (GradientStore.open(folder / side) for side in ("0", "1"))
    torch.zeros(64, 64).addmm_(torch.ones(64, 2000), torch.ones(64, 2000).T)  # loads what products need, once
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel_from_stores(left, right, None, budget)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= allowed, f"{grown / 2**20:.0f} MiB"


@pytest.mark.long
def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """Measured: two sides of 64 MiB and a budget of 24 MiB, with 16 MiB allowed to what is not ours."""
    shapes = {"a": (512, 256), "b": (512, 256)}
    for side in ("0", "1"):
        fill(new_store(tmp_path / side, shapes=shapes, num_grads=64), random_rows(64, int(side), shapes))
    assert in_process(work_within_budget, tmp_path, 24 * 2**20, 40 * 2**20) == 0


def test_sides_that_do_not_belong_together(tmp_path: Path) -> None:
    left, right = two_stores(tmp_path)
    other = replace(IDENTITY, parameters={**IDENTITY.parameters, "scale": "float32[]:cc"})
    stranger = fill(new_store(tmp_path / "2", fingerprint=other), random_rows())
    with refused(
        "the two stores are of different models: the trainable parameter 'scale' has other values in .*/0 than in .*/2"
    ):
        kernel_from_stores(left, stranger)
    narrow = {"scale": ()}
    with refused("their rows have other parameters"):
        kernel_from_stores(left, fill(new_store(tmp_path / "3", shapes=narrow), random_rows(shapes=narrow)))
    with refused("4 holds entropy rows: the training side must hold score rows"):
        kernel_from_stores(left, fill(new_store(tmp_path / "4", kind="entropy"), random_rows()))
    with refused("5 of 6 shards are not finished"):
        kernel_from_stores(left, fill(new_store(tmp_path / "5"), random_rows(), [0]))
    with right.data_path.open("r+b") as handle:
        handle.write(b"\xff")
    with refused(r"shard 0 \(rows 0 to 3\) is damaged"):
        kernel_from_stores(left, GradientStore.open(right.folder))


def test_a_preconditioner_of_another_model_is_refused(tmp_path: Path) -> None:
    left, right = two_stores(tmp_path)
    p = random_preconditioner(left.layout.shapes)
    for broken, message in (
        ({name: value for name, value in p.items() if name != "scale"}, "lacks 1 of 4 .* 'scale'"),
        ({**p, "scale": torch.ones(2)}, "of 'scale' is"),
        ({**p, "scale": torch.tensor(-1.0)}, "not positive and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_from_stores(left, right, broken)
