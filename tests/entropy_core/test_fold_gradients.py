"""Gradients in folds: their sum is the gradient, their spread its standard error, in one process or in several."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import length_buckets
from entropy_core.fold_gradients import (
    Estimate,
    FoldGradients,
    fold_estimate,
    fold_gradients,
    fold_of_sequences,
    fold_shares,
    shared_statistics,
)
from entropy_core.gradients import dot, entropy_gradient, entropy_rows
from entropy_core.passes.fold_rows import FoldRows
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.shared_prefix import shared_prefix_buckets
from entropy_core.processes import Processes
from entropy_core.scores import token_statistics
from tests.entropy_core.shared_work import OBJECTIVES, numbers_of_every_setting, objectives_of, random_direction
from tests.entropy_core.support import left_padded, right_padded
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.model_cases import CASES, PAD_TOKEN, VOCABULARY, ModelCase, TokenLists, random_sequences
from tests.two_processes import in_two_processes

EXACT = 1e-10
LLAMA = CASES[0]


def summed(gradient: FoldGradients) -> dict[str, Tensor]:
    return {name: folds.sum(0) for name, folds in gradient.folds.items()}


def test_folds_add_up_to_the_gradient_of_every_estimator(case) -> None:
    """In three folds; for two of the models the plain path as well."""
    for folds in (1, 3) if case.name in ("llama_tied", "gpt2_conv1d_tied_lora") else (3,):
        check_folds_add_up(case, folds)


def check_folds_add_up(case: ModelCase, folds: int) -> None:
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary), 0.9)
    found, statistics = fold_gradients(model, batch, objectives_of(batch), length_buckets, folds)
    for gradient, (estimator, per_token) in zip(found, OBJECTIVES, strict=True):
        assert gradient.count == folds
        wanted = entropy_gradient(model, batch, estimator, per_token)
        assert_named_close(summed(gradient), wanted, EXACT, f"{estimator}, per_token={per_token}: Σ folds ≠ gradient")
        assert list(gradient.folds) == list(wanted)
        assert_named_close(gradient.total(), wanted, EXACT, "total() is the sum over folds")
    again = token_statistics(model, batch)
    assert_close(statistics.logprobs, again.logprobs, EXACT, "log-probabilities of the same forward pass")
    assert_close(statistics.entropies, again.entropies, EXACT, "entropies of the same forward pass")
    assert all(p.grad is None for p in model.parameters()), "p.grad was touched"


def test_each_fold_holds_its_own_prompts_rows() -> None:
    model, lists = LLAMA.make(), random_sequences(VOCABULARY)
    batch = right_padded(lists)
    rows = entropy_rows(model, batch, "split")
    (gradient,), _ = fold_gradients(model, batch, objectives_of(batch, wanted=[("split", True)]), length_buckets, 3)
    for fold in range(3):
        members = [n for n, prompt in enumerate(lists.prompt_index) if prompt % 3 == fold]
        wanted = {name: row[members].sum(0) / len(batch) for name, row in rows.items()}
        assert_named_close({n: f[fold] for n, f in gradient.folds.items()}, wanted, EXACT, f"fold {fold}")


def test_completions_of_a_prompt_share_a_fold_and_folds_are_even() -> None:
    index = torch.tensor([7, 3, 7, 90, 3, 12, 5, 5, 41])
    folds = fold_of_sequences(index, 3)
    for prompt in index.unique():
        assert len(folds[index == prompt].unique()) == 1
    prompts_in = [len(index[folds == fold].unique()) for fold in range(3)]
    assert prompts_in == [2, 2, 2]


@pytest.mark.parametrize(
    ("token_batch_size", "layout", "folds"),
    [(1, length_buckets, 4), (9, shared_prefix_buckets, 4), (20, length_buckets, 1), (20, shared_prefix_buckets, 4)],
)
def test_several_buckets_give_what_one_gives(token_batch_size: int, layout, folds: int) -> None:
    model = LLAMA.make()
    batch = left_padded(random_sequences(VOCABULARY), temperature=0.9)
    buckets = partial(layout, token_batch_size=token_batch_size)
    assert len(buckets(batch)) > 1 and len(layout(batch)) == 1
    one, one_statistics = fold_gradients(model, batch, objectives_of(batch), layout, folds)
    several, statistics = fold_gradients(model, batch, objectives_of(batch), buckets, folds)
    for left, right in zip(several, one, strict=True):
        assert_named_close(left.folds, right.folds, EXACT, "buckets change the gradient: coefficients of a part of it")
    assert_close(statistics.entropies, one_statistics.entropies, EXACT, "buckets change the statistics")
    assert_close(shared_statistics(model, batch, buckets).logprobs, one_statistics.logprobs, EXACT, "statistics alone")


@pytest.mark.parametrize("folds", [1, 5])
def test_weights_of_sequences_enter_every_fold(folds: int) -> None:
    """Whole weights are copies of a sequence: the gradient on the batch with copies, without weights."""
    model, lists = LLAMA.make(), random_sequences(VOCABULARY)
    times = torch.tensor([1, 3, 2, 1, 2, 1, 4])
    copies = torch.repeat_interleave(torch.arange(7), times).tolist()
    repeated = right_padded(
        TokenLists(
            *([values[n] for n in copies] for values in (lists.prompt_ids, lists.completion_ids, lists.prompt_index))
        )
    )
    batch = right_padded(lists)
    wanted = [(e, u) for e, u in OBJECTIVES if e != "score_function"]  # a copy would stand in its own baseline
    weights = times.double() / times.double().mean()
    found, _ = fold_gradients(model, batch, objectives_of(batch, weights, wanted), length_buckets, folds)
    for gradient, (estimator, per_token) in zip(found, wanted, strict=True):
        expected = entropy_gradient(model, repeated, estimator, per_token)
        assert_named_close(summed(gradient), expected, EXACT, f"{estimator}, per_token={per_token}: weights")


def two_completions_each(prompts: int) -> TokenLists:
    """Prompts with two completions each, so that leaving one prompt out leaves out two sequences."""
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    beginnings = [draw(2 + p % 3) for p in range(prompts)]
    index = [p for p in range(prompts) for _ in range(2)]
    return TokenLists([beginnings[p] for p in index], [draw(1 + (3 * n) % 5) for n in range(2 * prompts)], index)


def test_the_standard_error_is_the_jackknife_that_estimates_anew_without_each_prompt() -> None:
    """With as many folds as prompts, for an estimator that is a mean over sequences."""
    model, batch = LLAMA.make(), right_padded(two_completions_each(6))
    direction = random_direction(model)
    objectives = objectives_of(batch, wanted=[("rao_blackwell", False)])
    (gradient,), _ = fold_gradients(model, batch, objectives, length_buckets, folds=6)
    left_out = []
    for prompt in range(6):
        rest = batch.select([n for n in range(len(batch)) if n // 2 != prompt])
        left_out.append(dot(entropy_gradient(model, rest, "rao_blackwell", False), direction))
    mean = sum(left_out) / 6
    squares = sum((value - mean) ** 2 for value in left_out)
    found = gradient.predict(direction)
    assert_close(found.value, dot(entropy_gradient(model, batch, "rao_blackwell", False), direction), EXACT, "value")
    assert_close(
        found.standard_error,
        (5 / 6 * squares) ** 0.5,
        1e-9,
        "not the jackknife over prompts",
        {
            "the spread of the leave-one-out values": (squares / 6) ** 0.5,
            "the spread of a summand, not the error of the sum": (5 * squares) ** 0.5,
            "sequences for prompts": (5 / 6 * squares / 2) ** 0.5,
        },
    )


def test_the_error_of_fewer_folds_is_the_spread_of_their_sums() -> None:
    parts = torch.tensor([1.0, -2.0, 4.0, 0.5], dtype=torch.float64)
    found = fold_estimate(parts)
    deviations = [float(p) - 3.5 / 4 for p in parts]
    assert found.value == 3.5
    assert found.standard_error == pytest.approx((4 * sum(d * d for d in deviations) / 3) ** 0.5)
    assert math.isnan(fold_estimate(parts[:1]).standard_error), "one fold says nothing of its error"
    both = Estimate(1.0, 3.0) + Estimate(2.0, 4.0)
    assert (both.value, both.standard_error) == (3.0, 5.0)


def test_the_error_of_unequal_folds_is_right_on_average() -> None:
    """Folds of 1, 1, 2 and 4 of 8 draws from a law with mean 5 and deviation 1: the squared error averages 1/8, whatever the mean
    is. 20000 estimates of it, each with a deviation of about 0.13, know their mean to 0.001."""
    draws = 5 + torch.randn(20_000, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    fold_of = torch.tensor([0, 1, 2, 2, 3, 3, 3, 3])
    parts = torch.zeros(20_000, 4, dtype=torch.float64).index_add_(1, fold_of, draws / 8)
    shares = fold_shares(fold_of, 4)
    assert shares.tolist() == [0.125, 0.125, 0.25, 0.5]
    mean_square = sum(fold_estimate(row, shares).standard_error ** 2 for row in parts) / len(parts)
    as_equal = sum(fold_estimate(row).standard_error ** 2 for row in parts[:500]) / 500
    assert_close(mean_square, 1 / 8, 0.02, "unequal folds", {"the folds' sizes count as noise": as_equal})


def test_gradients_of_unequal_folds_know_their_shares() -> None:
    """Sequences that all contribute the same have no error, however unequal the folds; shares are averaged as gradients are."""
    model, batch = LLAMA.make(), right_padded(random_sequences(VOCABULARY))
    (gradient,), _ = fold_gradients(model, batch, objectives_of(batch, wanted=[("split", True)]), length_buckets, 3)
    members = torch.bincount(fold_of_sequences(batch.prompt_index, 3), minlength=3)
    assert gradient.shares is not None and len(set(members.tolist())) > 1, "this batch's folds must be unequal"
    torch.testing.assert_close(gradient.shares, members.double() / len(batch))
    rows = {"a": gradient.shares[:, None] * torch.ones(1, 5, dtype=torch.float64)}
    equal = FoldGradients(rows, Processes(), gradient.shares)
    assert equal.predict({"a": torch.ones(5, dtype=torch.float64)}).standard_error == pytest.approx(0.0, abs=1e-12)
    later = FoldGradients(
        {"a": torch.ones(3, 5, dtype=torch.float64)}, Processes(), torch.tensor([0.5, 0.5, 0.0]).double()
    )
    blended = equal.blend(later, 0.5)
    torch.testing.assert_close(blended.shares, 0.5 * gradient.shares + 0.5 * later.shares)
    one_fold = FoldGradients({"a": torch.eye(2, 5)}, Processes(), torch.tensor([1.0, 0.0]))
    assert math.isnan(one_fold.predict({"a": torch.ones(5)}).standard_error), "all sequences in one fold: no error"


@pytest.mark.parametrize("folds", [1, 3])
def test_the_types_of_statistics_do_not_depend_on_the_way_they_are_had(folds: int) -> None:
    """Processes add theirs up, one of which may have one bucket, another several, or none."""
    model, batch = LLAMA.make().float(), right_padded(random_sequences(VOCABULARY))
    objectives = objectives_of(batch, wanted=[("rao_blackwell", True)])
    for buckets in (length_buckets, lambda b: length_buckets(b, 1), lambda b: []):
        _, statistics = fold_gradients(model, batch, objectives, buckets, folds)
        assert (statistics.logprobs.dtype, statistics.entropies.dtype) == (torch.float32, torch.float64)


def test_no_more_folds_than_prompts_and_one_prompt_has_no_error() -> None:
    model, batch = LLAMA.make(), right_padded(random_sequences(VOCABULARY))
    wanted = [("rao_blackwell", True)]
    (many,), _ = fold_gradients(model, batch, objectives_of(batch, wanted=wanted), length_buckets, folds=50)
    assert many.count == 5
    one = batch.select([0, 1])
    (single,), _ = fold_gradients(model, one, objectives_of(one, wanted=wanted), length_buckets, folds=4)
    estimate = single.predict(random_direction(model))
    assert single.count == 1 and math.isnan(estimate.standard_error)
    assert_close(
        estimate.value, dot(entropy_gradient(model, one), random_direction(model)), EXACT, "plain path of one prompt"
    )


class TwoInputs(nn.Module):
    """A trainable layer that mixes two tensors: rows cannot be formed behind it, a gradient can."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.mix = nn.Bilinear(4, 4, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, **ignored: object) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.mix(hidden, hidden.tanh()))


def test_models_without_rows_take_a_plain_pass_over_each_fold() -> None:
    model, lists = TwoInputs(), random_sequences(VOCABULARY)
    batch, objectives = right_padded(lists), [("split", True), ("rao_blackwell", False)]
    wanted = [entropy_gradient(model, batch, *objective) for objective in objectives]
    (plain, _), _ = fold_gradients(model, batch, objectives_of(batch, wanted=objectives), length_buckets, folds=1)
    assert_named_close(summed(plain), wanted[0], EXACT, "plain gradient")
    hooks, rows = len(model.mix._forward_hooks), FoldRows()
    for buckets in (length_buckets, partial(length_buckets, token_batch_size=9)):
        found, statistics = fold_gradients(model, batch, objectives_of(batch, wanted=objectives), buckets, 3, rows=rows)
        assert rows.failure is not None and "mix" in rows.failure, "the layer that has no rows is not named"
        for gradient, whole in zip(found, wanted, strict=True):
            assert_named_close(summed(gradient), whole, EXACT, "folds do not add up to the gradient")
        assert_close(statistics.logprobs, token_statistics(model, batch).logprobs, EXACT, "statistics")
    assert len(model.mix._forward_hooks) == hooks, "hooks are left behind after a refusal"
    for fold in range(3):  # by the prompts of each fold alone, normalised as the whole batch
        members = [n for n, prompt in enumerate(lists.prompt_index) if prompt % 3 == fold]
        expected = [
            entropy_rows(model, batch, *objective, passes=PassSettings(method="loop")) for objective in objectives
        ]
        for gradient, row in zip(found, expected, strict=True):
            part = {name: r[members].sum(0) / len(batch) for name, r in row.items()}
            assert_named_close({n: f[fold] for n, f in gradient.folds.items()}, part, EXACT, f"fold {fold}")


def test_unused_parameters_and_the_padding_tokens_row() -> None:
    """A parameter that the model did not use has zeros; the padding token's embedding its true gradient where the policy reads
    it, on either path."""
    model, lists = LLAMA.make(), random_sequences(VOCABULARY)
    lists.prompt_ids[2], lists.completion_ids[0] = [PAD_TOKEN, 4, PAD_TOKEN], [5, PAD_TOKEN, 6]
    batch = right_padded(lists)
    wanted = entropy_gradient(model, batch, "split")
    model.spare = nn.Linear(2, 2).double()
    model.model.embed_tokens.padding_idx = PAD_TOKEN
    for folds in (1, 3):
        objectives = objectives_of(batch, wanted=[("split", True)])
        (found,), _ = fold_gradients(model, batch, objectives, length_buckets, folds)
        total = summed(found)
        assert not total.pop("spare.weight").any() and not total.pop("spare.bias").any()
        assert_named_close(total, wanted, EXACT, "the padding token's row is masked")
        assert model.model.embed_tokens.padding_idx == PAD_TOKEN, "training's own rule is not restored"


def test_a_blend_is_a_weighted_mean_fold_by_fold_in_place() -> None:
    def gradient(seed: int, folds: int = 3) -> FoldGradients:
        generator = torch.Generator().manual_seed(seed)
        return FoldGradients(
            {"a": torch.randn(folds, 2, 4, generator=generator), "b": torch.ones(folds, 1) * seed}, Processes()
        )

    older, newer = gradient(1), gradient(2)
    wanted = 0.8 * older.folds["a"] + 0.2 * newer.folds["a"]
    memory = older.folds["a"].data_ptr()
    blended = older.blend(newer, 0.8)
    torch.testing.assert_close(blended.folds["a"], wanted)
    torch.testing.assert_close(blended.folds["b"], torch.full((3, 1), 1.2))
    assert blended.folds["a"].data_ptr() == memory, "the average must not grow"
    torch.testing.assert_close(newer.folds["a"], gradient(2).folds["a"])
    with pytest.raises(ValueError, match="3 folds .* 2"):
        gradient(1).blend(gradient(2, folds=2), 0.5)


def test_directions_must_cover_the_same_parameters() -> None:
    gradient = FoldGradients({"a": torch.ones(2, 3)}, Processes())
    assert gradient.along({"a": torch.tensor([1.0, 2.0, 3.0])}).tolist() == [6.0, 6.0]
    with pytest.raises(ValueError, match="'b'"):
        gradient.along({"a": torch.ones(3), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="'a'"):
        gradient.along({})


@pytest.mark.long
def test_two_processes_find_what_one_finds() -> None:
    alone, (first, second) = numbers_of_every_setting(), in_two_processes(numbers_of_every_setting)
    assert sorted(first.pop("mine") + second.pop("mine")) == alone.pop("mine") == list(range(6)), "each sequence once"
    assert first.pop("sum") == second.pop("sum") == [2.0, 4.0] and alone.pop("sum") == [1.0, 2.0]
    for numbers in (first, second, alone):
        assert numbers.pop("summed tensor afterwards") == [1.0, 2.0], "the tensor that is summed must stay as it was"
        assert numbers.pop("any") == [0.0, 1.0], "any() of nobody, and of the last process alone"
    assert first.keys() == second.keys() == alone.keys() and len(alone) == 24
    for name, wanted in alone.items():
        assert first[name] == second[name], f"{name}: the processes disagree"
        assert_close(
            torch.tensor(first[name]),
            torch.tensor(wanted),
            1e-6,
            f"{name}: two processes differ from one (a fold, a normaliser, or the statistics of a part)",
        )


@pytest.mark.parametrize("folds", [1, 3], ids=["plain", "rows"])
@pytest.mark.parametrize("kind", ["parameter", "module", "module before"])
def test_hooks_that_change_an_optimizers_gradient_leave_the_derivative_alone(kind: str, folds: int) -> None:
    """A mask or a projection of gradients (peft's OSF has one) changes the step, not what entropy does along it."""
    model, batch = LLAMA.make(), right_padded(random_sequences(LLAMA.vocabulary), 0.9)

    def gradient() -> dict[str, Tensor]:
        return fold_gradients(model, batch, objectives_of(batch), length_buckets, folds)[0][0].total()

    wanted = gradient()
    name, p = next((n, p) for n, p in model.named_parameters() if p.requires_grad and bool(wanted[n].any()))
    owner = model.get_submodule(name.rpartition(".")[0])
    if kind == "parameter":
        p.register_hook(lambda g: 3 * g)
    elif kind == "module":
        owner.register_full_backward_hook(lambda _m, inputs, _o: tuple(None if g is None else 3 * g for g in inputs))
        list(model.modules())[-1].register_full_backward_hook(lambda _m, i, _o: tuple(3 * g for g in i))
    else:
        list(model.modules())[-1].register_full_backward_pre_hook(lambda _m, outputs: tuple(3 * g for g in outputs))
    assert_named_close(gradient(), wanted, EXACT, f"a hook on a {kind} changed the derivative")
    assert_named_close(entropy_gradient(model, batch, *OBJECTIVES[0]), wanted, EXACT, "and that of plain autograd")
    if kind == "parameter":
        p.sum().backward()
        assert p.grad is not None and bool((p.grad == 3).all()), "the hook is gone"
    else:
        assert any(m._backward_hooks or m._backward_pre_hooks for m in model.modules()), "the hook is gone"
