"""Per-sequence rows against autograd on one unpadded sequence at a time, for every model of the table."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import (
    batch_gradients,
    dot,
    entropy_rows,
    gradient_rows,
    per_sequence_gradients,
    stream_rows,
    trainable_parameters,
)
from entropy_core.passes.row_check import RowSums, RowSumsDifferError
from entropy_core.passes.settings import PassSettings
from tests.entropy_core.support import alone, left_padded, padded, right_padded
from tests.oracle import brute_force
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.enumeration import flatten_rows
from tests.oracle.model_cases import CASES, ModelCase, parameters_of, random_sequences

BY_NAME = {case.name: case for case in CASES}
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("method", ["hooks", "loop"])
def test_score_rows_equal_brute_force(case: ModelCase, method: str, dtype, tolerance: float) -> None:
    lists = random_sequences(case.vocabulary)
    expected = brute_force.score_rows(case.make(), lists, 0.8)
    rows = per_sequence_gradients(case.make(dtype), right_padded(lists, 0.8), passes=PassSettings(method=method))
    assert list(rows) == list(expected), "parameters are missing, renamed or in another order"
    assert all(row.dtype == dtype for row in rows.values())
    smell = "a hook misses a use, or x and dy are paired wrongly"
    if dtype == torch.float64:
        assert_named_close(rows, expected, tolerance, smell)
    else:  # by the norm of the whole row set: a tensor's own rounding scales with what flows by, and keys' gradients cancel
        assert_close(flatten_rows(rows), flatten_rows(expected), tolerance, smell)


@pytest.mark.parametrize("method", ["hooks", "loop"])
def test_entropy_rows_equal_brute_force(case: ModelCase, method: str) -> None:
    lists = random_sequences(case.vocabulary)
    model = case.make()
    rows = entropy_rows(model, right_padded(lists, 1.2), per_token=False, passes=PassSettings(method=method))
    expected = brute_force.entropy_terms(model, lists, 1.2)
    assert_named_close(rows, expected, 1e-10, "E_t = Σ_k ∇H_k + Σ_k G_k ∇log π_k")
    h = brute_force.token_entropy(model, lists, 1.2)
    mean_length = sum(map(len, lists.completion_ids)) / len(lists.completion_ids)
    centred = brute_force.entropy_terms(model, lists, 1.2, centre=h)
    rows = entropy_rows(model, right_padded(lists, 1.2), per_token=True, passes=PassSettings(method=method))
    expected = {name: row / mean_length for name, row in centred.items()}
    assert_named_close(rows, expected, 1e-10, "per-token rows are centred by h and divided by the mean length")


def test_every_trainable_parameter_has_rows_that_add_up(case: ModelCase) -> None:
    model, batch = case.make(), left_padded(random_sequences(case.vocabulary))
    rows = per_sequence_gradients(model, batch)
    assert list(rows) == list(parameters_of(model)) == list(trainable_parameters(model))
    sums = {name: row.sum(0) for name, row in rows.items()}
    assert_named_close(sums, batch_gradients(model, batch, [score_coefficients(batch)])[0], 1e-12, "rows do not add up")
    empty = [name for name, row in rows.items() if not row.any()]
    assert not empty, f"{empty[:3]} have rows of zeros: their uses are not seen"


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32"])
def test_rows_do_not_see_padding_or_neighbours(case: ModelCase, dtype, tolerance: float) -> None:
    lists = random_sequences(case.vocabulary)
    model = case.make(dtype)
    expected = per_sequence_gradients(model, right_padded(lists))
    noise = case.vocabulary - 1
    layouts = {
        "left padding": left_padded(lists, noise),
        "padding on both sides": padded(lists, [2, 0, 1, 4, 2, 0, 3], [1, 2, 5, 0, 0, 3, 1], noise),
    }
    for name, layout in layouts.items():
        assert_named_close(per_sequence_gradients(model, layout), expected, tolerance, f"{name} changes the rows")
    singles = [per_sequence_gradients(model, alone(lists, n)) for n in range(7)]
    stacked = {name: torch.cat([single[name] for single in singles]) for name in expected}
    assert_named_close(stacked, expected, tolerance, "a row depends on the other sequences of its batch")


@pytest.mark.parametrize("token_batch_size", [1, 13, 30])
def test_rows_do_not_depend_on_the_bucket_size(case: ModelCase, token_batch_size: int) -> None:
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary))
    expected = per_sequence_gradients(model, batch)
    actual = per_sequence_gradients(model, batch, passes=PassSettings(token_batch_size))
    assert_named_close(actual, expected, 1e-11, "buckets scatter rows to the wrong sequences")


@pytest.mark.parametrize("method", ["hooks", "loop"])
def test_training_mode_does_not_matter(case: ModelCase, method: str) -> None:
    """Dropout off, flags restored, no hook left behind, `p.grad` and `requires_grad` untouched, checkpointing
    idle."""
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary))
    expected = per_sequence_gradients(model, batch, passes=PassSettings(method=method))
    model.train()
    for enable in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, enable):  # the newer of its two names
            getattr(model, enable)()
            break
    next(module for module in model.modules() if isinstance(module, nn.Embedding)).eval()
    flags = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():  # a caller's no_grad must not silence the rows
        actual = per_sequence_gradients(model, batch, passes=PassSettings(method=method))
    assert_named_close(actual, expected, 1e-11, "dropout is on, or checkpointing replays the forward")
    assert [module.training for module in model.modules()] == flags, "training flags are not restored"
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks, "a hook was left"
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters()), "p.grad was written: the optimizer would see it"


def test_existing_gradients_are_left_alone() -> None:
    model = BY_NAME["gpt2_conv1d_tied"].make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    per_sequence_gradients(model, right_padded(random_sequences(37)))
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


@pytest.mark.parametrize("pattern", ["layernorm", "layers.0.mlp", "embed_tokens", "k_proj"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_biases"])
def test_only_what_is_trainable_has_rows(name: str, pattern: str) -> None:
    lists = random_sequences(37)
    model = BY_NAME[name].make()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern in parameter_name)
    rows = per_sequence_gradients(model, right_padded(lists))
    assert rows and all(pattern in row for row in rows)
    assert_named_close(rows, brute_force.score_rows(model, lists), 1e-10, "frozen layers below or above break the rows")


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = BY_NAME["llama_tied"].make().requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        per_sequence_gradients(model, right_padded(random_sequences(37)))


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="hooks"):
        per_sequence_gradients(
            BY_NAME["recurrent_policy"].make(), right_padded(random_sequences(4)), passes=PassSettings(method="vmap")
        )


class Odd(nn.Module):
    """A one-layer policy over four tokens that uses its parameters in the way that `kind` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(4, 3)
        self.inner = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4)
        self.unused = nn.Linear(3, 3) if kind == "unused module" else None
        self.scale = nn.Parameter(torch.tensor([1.5])) if kind == "parameter of the whole model" else None
        self.pair = Pair() if kind == "two tensors" else None
        self.double()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        if self.kind == "weight without its module":
            x = torch.tanh(nn.functional.linear(x, self.inner.weight, self.inner.bias))
        elif self.kind == "weight also without its module":
            x = torch.tanh(self.inner(x) + nn.functional.linear(x, self.inner.weight))
        elif self.kind == "time first":
            x = torch.tanh(self.inner(x.transpose(0, 1)).transpose(0, 1))
        elif self.kind == "flattened tokens":
            x = torch.tanh(self.inner(x.reshape(-1, 3)).reshape(x.shape))
        elif self.kind == "two tensors":
            x = torch.tanh(self.pair(self.inner(x), x))
        elif self.kind == "module twice":
            x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        elif self.kind == "weight inside a product":
            x = torch.tanh(self.inner(x) * self.inner.weight.sum())
        else:
            x = torch.tanh(self.inner(x))
        if self.scale is not None:
            x = x * self.scale
        return SimpleNamespace(logits=self.head(x))


class Pair(nn.Module):
    """A weighted sum of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4]))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.weight[0] * left + self.weight[1] * right


COVERED = ["module twice", "unused module"]
UNCOVERED = {
    "weight without its module": "inner",
    "weight also without its module": "inner",
    "time first": "inner",
    "flattened tokens": "inner",
    "two tensors": "pair",
    "parameter of the whole model": "scale",
    "weight inside a product": "inner",
}


@pytest.mark.parametrize("kind", COVERED)
def test_reused_and_unused_modules_are_covered(kind: str) -> None:
    lists, model = random_sequences(4), Odd(kind)
    rows = per_sequence_gradients(model, right_padded(lists))
    assert_named_close(rows, brute_force.score_rows(model, lists), 1e-10, f"{kind}: uses do not add up")


@pytest.mark.parametrize("kind", UNCOVERED)
def test_what_hooks_cannot_cover_is_refused_by_name_and_the_loop_covers_it(kind: str) -> None:
    lists, model = random_sequences(4), Odd(kind)
    batch = right_padded(lists)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=UNCOVERED[kind]) as refusal:
        per_sequence_gradients(model, batch, passes=PassSettings(method="hooks"))
    assert "loop" in str(refusal.value), "the message does not say how to mend it"
    assert [len(m._forward_hooks) for m in model.modules()] == hooks, "a hook was left behind after the refusal"
    rows = per_sequence_gradients(model, batch, passes=PassSettings(method="loop"))
    assert_named_close(rows, brute_force.score_rows(model, lists), 1e-10, f"{kind}: the loop is plain autograd")


def test_a_use_is_refused_though_the_smallest_bucket_has_no_gradient() -> None:
    """A bucket whose objective is constant says nothing; the next one is checked in its place."""
    batch, model = right_padded(random_sequences(4)), Odd("weight also without its module")
    c = score_coefficients(batch)
    shortest = int(batch.attention_mask.sum(1).argmin())
    c.logprob[shortest] = 0.0
    with pytest.raises(ValueError, match="inner"):
        gradient_rows(model, batch, c, passes=PassSettings(1, "hooks"))
    c.logprob.zero_()
    rows = gradient_rows(model, batch, c, passes=PassSettings(1, "hooks"))
    assert not any(row.any() for row in rows.values())


def test_rows_are_refused_where_autograd_finds_no_gradient_at_all() -> None:
    """No gradient beside rows that are not zero is a disagreement, not a constant objective."""
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    sums = RowSums(parameters)
    assert sums.errors([None]) == {} and sums.errors([torch.zeros(3)]) == {}
    sums.add("w", torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1e-6, 0.0]]))
    assert sums.errors([torch.zeros(3)])["w"] == pytest.approx(1e-6)
    sums.add("w", torch.tensor([[0.0, 0.0, 1e-3]]))
    with pytest.raises(RowSumsDifferError) as refusal:
        sums.errors([None])
    assert refusal.value.parameter == "w"


def test_rows_of_a_broken_model_are_not_blamed_on_its_modules() -> None:
    """What is NaN is named by checks of values; that the sums differ would send the user to the wrong place."""
    model, batch = Odd("module once"), right_padded(random_sequences(4))
    c = score_coefficients(batch)
    c.logprob[0] = torch.nan
    assert not gradient_rows(model, batch, c)["inner.weight"].isfinite().all()
    with torch.no_grad():
        model.inner.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        per_sequence_gradients(model, batch)


def test_buckets_are_checked_as_they_double_and_no_other_is_asked_for_gradients(monkeypatch) -> None:
    """Every objective of the smallest bucket, and of each that is twice as long as any checked before."""
    asked = []
    ordinary = torch.autograd.grad

    def counted(outputs, inputs, **options):
        asked.append(len(inputs))
        return ordinary(outputs, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    model, lengths = Odd("module once"), (2, 3, 3, 5, 7, 9)
    batch = SequenceBatch.from_sequences([[1]] * 6, [[2] * n for n in lengths], list(range(6)), 0)
    objectives, parameters = [score_coefficients(batch)] * 2, len(trainable_parameters(model))
    stream_rows(model, batch, objectives, lambda *_: None, passes=PassSettings(1), restart=lambda: None)
    expected, checked = [], 0
    for length in lengths:
        due = length >= 2 * checked
        checked = length if due else checked
        expected += [1 + parameters * due] * 2
    assert asked == expected and asked.count(1 + parameters) == 4
    asked.clear()
    stream_rows(model, batch, [score_coefficients(batch)], lambda *_: None, passes=PassSettings(1, verify=False))
    assert asked == [1] * len(batch)


def test_the_smallest_bucket_passes_first_where_rows_are_checked() -> None:
    lists, seen = [[1] * k for k in (3, 3, 3, 4)], []
    batch = SequenceBatch.from_sequences([[2, 3]] * 4, lists, list(range(4)), 0)

    def note(_number: int, name: str, indices: Tensor, _rows: Tensor) -> None:
        seen.extend([indices.tolist()] if name == "head.bias" else [])

    for verify, order in ((True, [[3], [0, 1, 2]]), (False, [[0, 1, 2], [3]])):
        seen.clear()
        stream_rows(
            Odd("module once"), batch, [score_coefficients(batch)], note, passes=PassSettings(16, verify=verify)
        )
        assert seen == order


def test_dot_sums_over_names() -> None:
    left = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    right = {"b": torch.tensor([[5.0]]), "a": torch.tensor([-1.0, 4.0])}
    assert dot(left, right) == 22.0
    with pytest.raises(ValueError, match="'b'"):
        dot(left, {"a": right["a"]})


@pytest.fixture
def one_process_group():
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_distributed_wrapper_changes_nothing() -> None:
    case = BY_NAME["llama_untied_lora"]
    batch = right_padded(random_sequences(case.vocabulary))
    expected = per_sequence_gradients(case.make(), batch)
    wrapped = nn.parallel.DistributedDataParallel(case.make())
    assert_named_close(
        per_sequence_gradients(wrapped, batch), expected, 1e-12, "DDP's `module.` prefix leaks into names"
    )
    loss = wrapped(input_ids=batch.input_ids).logits.sum()
    loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad), "training after the rows is broken"


def test_a_walked_graph_keeps_no_inputs() -> None:
    """Until the next bucket had its own, two buckets' inputs lay in memory: a third of a kernel's peak."""
    case = BY_NAME["llama_tied_lora"]
    model, batch = case.make(), right_padded(random_sequences(case.vocabulary))
    alive: list[int] = []
    seen: list[weakref.ref] = []

    def watch(_module, args):
        if len(seen) % layers == 0:
            alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(args[0]))

    tapped = [m for name, m in model.named_modules() if "lora_" in name and isinstance(m, nn.Linear)]
    layers = len(tapped)
    for module in tapped:
        module.register_forward_pre_hook(watch)
    with torch.enable_grad():
        stream_rows(
            model, batch, [score_coefficients(batch)] * 2, lambda *_: None, passes=PassSettings(1, verify=False)
        )
    assert layers > 0 and len(seen) == len(batch) * layers
    assert alive == [0] * len(batch), "a bucket's inputs outlive it"
