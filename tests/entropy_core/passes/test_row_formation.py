"""Rows by hooks, or by a loop where hooks fail: whenever they fail, the rows are those of one sequence at a time."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from entropy_core.entropy import score_coefficients
from entropy_core.gradients import gradient_rows, keeping, per_sequence_gradients, stream_rows, trainable_parameters
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_core.passes.row_formation import RowFormation, RowsNotFormedError, SlowRowsWarning
from entropy_core.passes.settings import PassSettings
from tests.entropy_core.support import right_padded
from tests.oracle import brute_force
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.enumeration import fisher_kernel, flatten_rows
from tests.oracle.model_cases import TokenLists, random_sequences

VOCABULARY = 9
LENGTHS = (1, 2, 4, 6, 9, 12)


class Policy(nn.Module):
    """Embedding, a running mean over the past, and a head; `kind` says when it does what no hook sees."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.inner, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6), nn.Linear(6, VOCABULARY)
        self.rare = nn.Embedding(1, 6).requires_grad_(kind == "one token")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.double()

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        n, length = input_ids.shape
        hidden = self.embedding(input_ids)
        hidden = hidden.cumsum(1) / torch.arange(1, length + 1, dtype=hidden.dtype)[:, None]
        if self.kind == "always":
            inner = nn.functional.linear(hidden, self.inner.weight, self.inner.bias)
        elif self.kind == "where it is long" and length > 8:
            inner = nn.functional.linear(hidden, self.inner.weight, self.inner.bias)
        elif self.kind == "flattened where it is long" and length > 8:
            inner = self.inner(hidden.reshape(-1, 6)).view(n, length, 6)
        elif self.kind == "overwritten":
            inner = self.inner(hidden)
            inner += hidden
        else:
            inner = self.inner(hidden)
        inner = inner.tanh()
        if self.kind == "one token":  # only where the rare token 8 stands
            inner = inner + torch.where((input_ids == 8)[..., None], self.rare.weight[0], 0.0)
        elif self.kind == "mixes":
            inner = inner + 0.3 * hidden.mean(0, keepdim=True)
        return SimpleNamespace(logits=self.head(inner))


def lists(rare: int | None = None) -> TokenLists:
    """One prompt token and LENGTHS tokens of completion; rare: the sequence that holds token 8."""
    generator = torch.Generator().manual_seed(5)
    completions = [torch.randint(0, 8, (n,), generator=generator).tolist() for n in LENGTHS]
    if rare is not None:
        completions[rare][0] = 8
    return TokenLists([[n] for n in range(len(LENGTHS))], completions, list(range(len(LENGTHS))))


def reference(model: nn.Module, tokens: TokenLists) -> dict[str, Tensor]:
    return brute_force.score_rows(model, tokens)


@pytest.mark.parametrize("kind", ["always", "where it is long", "flattened where it is long"])
@pytest.mark.parametrize("token_batch_size", [1, 20, 4096])
def test_the_loop_takes_over_whenever_hooks_fail(kind: str, token_batch_size: int) -> None:
    """Also after rows of shorter buckets were sent: none of them is left in the result."""
    model, tokens = Policy(kind), lists()
    with pytest.warns(
        SlowRowsWarning, match=r"one backward pass per sequence instead: about 6 passes in place of \d"
    ) as said:
        found = per_sequence_gradients(model, right_padded(tokens), passes=PassSettings(token_batch_size))
    assert len([w for w in said if w.category is SlowRowsWarning]) == 1
    assert_named_close(found, reference(model, tokens), 1e-12, "rows of two attempts are mixed")
    assert "'inner.weight'" in str(said[0].message) and "'inner' (Linear)" in str(said[0].message)


def test_a_second_objective_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from entropy_core.passes.gradient_hooks import RowHooks

    ordinary, calls = RowHooks.send, []

    def wrong_later(self: RowHooks, name: str, rows: Tensor) -> None:
        calls.append(name)
        ordinary(self, name, rows * (1.5 if calls.count("inner.weight") > 1 and name == "inner.weight" else 1.0))

    monkeypatch.setattr(RowHooks, "send", wrong_later)
    model, tokens = Policy("fine"), lists()
    batch = right_padded(tokens)
    trained = trainable_parameters(model)
    rows = [{n: torch.zeros(len(batch), *p.shape, dtype=p.dtype) for n, p in trained.items()} for _ in range(2)]

    def restart() -> None:
        for one in rows:
            for part in one.values():
                part.zero_()

    with pytest.warns(SlowRowsWarning, match=r"inner\.weight"):
        stream_rows(model, batch, [score_coefficients(batch)] * 2, keeping(rows), restart=restart)
    for one in rows:
        assert_named_close(one, reference(model, tokens), 1e-12, "a wrong second objective went through")


def test_a_parameter_without_gradient_in_the_first_bucket_is_checked_later() -> None:
    """Used by no module's call, and only for a token that the smallest bucket does not hold."""
    model, tokens = Policy("one token"), lists(rare=4)
    batch = right_padded(tokens)
    with pytest.raises(RowsNotFormedError, match=r"rare\.weight"):
        per_sequence_gradients(model, batch, passes=PassSettings(1, "hooks"))
    with pytest.warns(SlowRowsWarning, match=r"rare\.weight"):
        found = per_sequence_gradients(model, batch, passes=PassSettings(1))
    assert_named_close(found, reference(model, tokens), 1e-12, "the rare token's parameter is missing")


def test_a_small_gradient_that_is_missing_is_noticed() -> None:
    """6e-5 of the whole gradient is below its tolerance, but P may make it as large as any other."""
    model, tokens = Policy("one token"), lists(rare=4)
    with torch.no_grad():
        model.head.weight.mul_(2.5e-4)
        model.head.bias.mul_(2.5e-4)
    whole = reference(model, tokens)
    share = float(whole["rare.weight"].norm() / flatten_rows(whole).norm())
    assert 2e-5 < share < 1e-4, share
    with pytest.raises(RowsNotFormedError, match=r"rare\.weight"):
        per_sequence_gradients(model, right_padded(tokens), passes=PassSettings(method="hooks"))


def test_outputs_that_the_model_overwrites_are_copied() -> None:
    model, tokens = Policy("overwritten"), lists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = per_sequence_gradients(model, right_padded(tokens), passes=PassSettings(method="hooks"))
    assert_named_close(found, reference(model, tokens), 1e-12, "hooks see what was overwritten")


def test_a_model_that_mixes_sequences_is_passed_one_by_one() -> None:
    """Its rows add up, but to the gradient of another function: each sequence's own is that of it alone."""
    model, tokens = Policy("mixes"), lists()
    with pytest.raises(RowsNotFormedError, match="mixes sequences.*token_batch_size=1"):
        per_sequence_gradients(model, right_padded(tokens), passes=PassSettings(method="hooks"))
    with pytest.warns(SlowRowsWarning):
        found = per_sequence_gradients(model, right_padded(tokens))
    assert_named_close(found, reference(model, tokens), 1e-12, "rows depend on their neighbours")


def test_a_sink_that_cannot_be_emptied_is_never_fed_twice() -> None:
    """Without `restart`: the first bucket decides before anything is sent; what fails later is raised, with the remedy."""
    seen: list[int] = []

    def sink(_number: int, name: str, indices: Tensor, _rows: Tensor) -> None:
        seen.extend(indices.tolist() if name == "head.bias" else [])

    batch = right_padded(lists())
    score = [score_coefficients(batch)]
    with pytest.warns(SlowRowsWarning):
        stream_rows(Policy("always"), batch, score, sink, passes=PassSettings(1))
    assert sorted(seen) == list(range(len(LENGTHS)))
    for kind in ("where it is long", "flattened where it is long"):
        with pytest.raises(RowsNotFormedError, match=r"method='loop'\) .*entropy_analysis\.fisher_kernel\.method=loop"):
            stream_rows(Policy(kind), batch, score, sink, passes=PassSettings(1))


def test_what_was_learnt_of_a_model_holds_for_later_calls() -> None:
    said: list[str] = []
    formation = RowFormation(announce=said.append, cost=lambda: (70, 8))
    model, batch = Policy("always"), right_padded(lists())
    for _ in range(2):
        gradient_rows(model, batch, score_coefficients(batch), passes=PassSettings(method=formation))
    assert formation.in_use == "loop" and formation.to_json()["reason"] in said[0]
    assert len(said) == 1 and said[0].endswith("about 70 passes in place of 8")


def test_a_kernel_by_the_loop_is_the_kernel() -> None:
    model, tokens = Policy("where it is long"), lists()
    batch = right_padded(tokens)
    rows = flatten_rows(reference(model, tokens))
    with pytest.warns(SlowRowsWarning):
        kernel = compute_cross_fisher_kernel(model, batch, batch.select([1, 4]), passes=PassSettings(20))
    assert_close(kernel, fisher_kernel(rows, rows[[1, 4]]), 1e-6, "kernel")


def test_a_broken_model_is_not_looped_over() -> None:
    model, batch = Policy("fine"), right_padded(lists())
    with torch.no_grad():
        model.inner.bias[0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowRowsWarning)
        with pytest.raises(ValueError, match="NaN"):
            per_sequence_gradients(model, batch)


def test_less_than_float32_is_refused_and_not_looped_over() -> None:
    model, batch = Policy("fine").to(torch.bfloat16), right_padded(lists())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowRowsWarning)
        with pytest.raises(ValueError, match=r"bfloat16.*checkpoint\.dtype=float32"):
            per_sequence_gradients(model, batch)


def test_unknown_methods_and_empty_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="token_batch_size must be at least 1, not 0"):
        PassSettings(0)
    with pytest.raises(ValueError, match="auto"):
        PassSettings(method="vmap")  # pyright: ignore[reportArgumentType]


def test_random_sequences_need_no_loop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowRowsWarning)
        per_sequence_gradients(Policy("fine"), right_padded(random_sequences(VOCABULARY)))
