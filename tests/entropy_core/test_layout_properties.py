"""No number depends on how sequences are laid out or dealt: order, padding, pass size, tiles, processes. To rounding."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.entropy import entropy_coefficients
from entropy_core.fold_gradients import FoldGradients, fold_gradients
from entropy_core.kernel import compute_kernels
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import Processes
from tests.entropy_core.support import padded, right_padded
from tests.entropy_core.test_kernel import random_preconditioner
from tests.oracle.model_cases import CASES, PAD_TOKEN, TokenLists, random_sequences
from tests.thread_processes import in_threads

CASE = next(case for case in CASES if case.name == "recurrent_policy")
# Kernels are float32 whatever the model is; sums in another order differ in its last digits.
SINGLE, DOUBLE = 3e-6, 1e-11
COUNT = 7


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """An order of the sequences, pads before and behind each, and tokens in a pass."""
    order = draw(st.permutations(range(COUNT)))
    left, right = (draw(st.lists(st.integers(0, 4), min_size=COUNT, max_size=COUNT)) for _ in range(2))
    return order, left, right, draw(st.sampled_from((1, 9, 17, 40, 4096)))


def laid_out(lists: TokenLists, order: list[int], left: list[int], right: list[int]) -> SequenceBatch:
    chosen = TokenLists(
        *([part[n] for n in order] for part in (lists.prompt_ids, lists.completion_ids, lists.prompt_index))
    )
    return padded(chosen, left, right, PAD_TOKEN)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    off = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert off < tolerance, f"off by {off:.1e}"


@settings(max_examples=40)
@given(ours=layouts(), theirs=layouts(), seed=st.integers(0, 3))
def test_kernels_do_not_depend_on_order_padding_or_passes(ours, theirs, seed) -> None:
    model = CASE.make()
    preconditioner = random_preconditioner(model)
    sides = [random_sequences(CASE.vocabulary, seed=2 * seed + k) for k in range(2)]
    expected = compute_kernels(model, right_padded(sides[0]), right_padded(sides[1]), preconditioner)
    found = compute_kernels(
        model, laid_out(sides[0], *ours[:3]), laid_out(sides[1], *theirs[:3]), preconditioner,
        passes=PassSettings(min(ours[3], theirs[3])),
    )  # fmt: skip
    for one, other in ((found.fisher, expected.fisher), (found.entropy_fisher, expected.entropy_fisher)):
        _close(one, other[ours[0]][:, theirs[0]], SINGLE)


@settings(max_examples=25)
@given(rows=st.sets(st.integers(1, COUNT - 1), max_size=3), columns=st.sets(st.integers(1, COUNT - 1), max_size=3))
def test_tiles_make_up_the_kernel(rows, columns) -> None:
    """Of KH too, where a tile's rows have the statistics of the whole batch."""
    model = CASE.make()
    preconditioner = random_preconditioner(model)
    sides = [right_padded(random_sequences(CASE.vocabulary, seed=k)) for k in range(2)]
    whole = compute_kernels(model, *sides, preconditioner, per_token=False)
    pieces = [torch.tensor_split(torch.arange(COUNT), sorted(cuts)) for cuts in (rows, columns)]
    for some in pieces[0]:
        for others in pieces[1]:
            tile = compute_kernels(
                model, sides[0].select(some), sides[1].select(others), preconditioner, per_token=False
            )
            _close(tile.fisher, whole.fisher[some][:, others], SINGLE)
            _close(tile.entropy_fisher, whole.entropy_fisher[some][:, others], SINGLE)


def _gradients(model: torch.nn.Module, batch: SequenceBatch, tokens: int, processes: Processes) -> list[FoldGradients]:
    wanted = (("rao_blackwell", True), ("score_function", False))
    return fold_gradients(
        model, batch, lambda known: [entropy_coefficients(known, batch, name, per_token) for name, per_token in wanted],
        lambda some: length_buckets(some, tokens), 3, processes,
    )[0]  # fmt: skip


@settings(max_examples=25)
@given(layout=layouts(), count=st.integers(1, 3), seed=st.integers(0, 3))
def test_gradients_in_folds_do_not_depend_on_order_padding_passes_or_processes(layout, count, seed) -> None:
    model, lists = CASE.make(), random_sequences(CASE.vocabulary, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    expected = [g.along(direction) for g in _gradients(model, right_padded(lists), 4096, Processes())]
    batch = laid_out(lists, *layout[:3])

    def member(processes: Processes) -> list[Tensor]:
        return [g.along(direction) for g in _gradients(copy.deepcopy(model), batch, layout[3], processes)]

    for found in in_threads([member] * count):
        for one, other in zip(found, expected, strict=True):
            _close(one, other, DOUBLE)
