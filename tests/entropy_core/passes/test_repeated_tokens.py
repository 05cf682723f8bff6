"""Frozen layers multiply each distinct token once: the same numbers, fewer products, and a check that it may be done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.directional import token_derivatives
from entropy_core.entropy import TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.gradients import gradient_rows
from entropy_core.passes import state as pass_state
from entropy_core.passes import token_plan
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.state import PassState
from entropy_core.passes.token_plan import TokenPlan
from entropy_core.scores import token_statistics

PROMPT = [5, 9, 11, 4, 8, 13, 7, 6]
OTHER = [5, 9, 12, 4, 8, 13, 7, 6]  # two tokens in common
COMPLETIONS = [[3, 4, 5, 6, 7, 8], [3, 4], [9, 10, 3], [3, 4, 5], [7], [3, 4, 5, 6, 7, 8]]


@pytest.fixture
def narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as narrow as a test's are taken as well."""
    monkeypatch.setattr(token_plan, "COPYING", 0)


def shared_batch() -> SequenceBatch:
    prompts = [PROMPT, PROMPT, OTHER, OTHER, PROMPT, PROMPT]
    return SequenceBatch.from_sequences(prompts, COMPLETIONS, [0, 0, 1, 1, 0, 0], pad_token_id=0, temperature=0.8)


def adapted_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules="all-linear"))
        for p in model.parameters():
            p.data.copy_(torch.randn(p.shape) * 0.3)
    return model.double().eval()


def frozen_layers(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]


class ForwardProducts(TorchDispatchMode):
    """Numbers of tokens that are multiplied by frozen weights (out, in) from the right, x W^T, in the order of the products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self._weights = {m.weight.data_ptr(): m.weight.shape[::-1] for m in frozen_layers(model)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            if self._weights.get(right.data_ptr()) == right.shape:
                self.tokens.append(len(left))
        return func(*args, **(kwargs or {}))


def pass_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for test in ("is_frozen_linear", "plain_adapter"):
        monkeypatch.setattr(pass_state, test, lambda module: None)


def distinct_beginnings(batch: SequenceBatch) -> int:
    """Beginnings of sequences that some completion token is predicted from."""
    rows = [ids[keep].tolist() for ids, keep in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return len({tuple(row[:k]) for row in rows for k in range(1, len(row))})


@pytest.mark.parametrize("kind", ["score", "entropy"])
def test_rows_are_those_of_one_sequence_at_a_time(
    kind: str, narrow_layers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = adapted_llama(), shared_batch()
    coefficients = score_coefficients(batch)
    if kind == "entropy":
        coefficients = entropy_coefficients(token_statistics(model, batch), batch, "rao_blackwell")
    with ForwardProducts(model) as products:
        found = gradient_rows(model, batch, coefficients, passes=PassSettings(verify=False))
    # the output layer sees completion tokens alone: two when it is called, which are multiplied once more to see that this is
    # its weight's doing, and all of them afterwards
    inside = len(frozen_layers(model)) - 1
    assert products.tokens[inside:] == [2, 2, int(batch.completion_mask.sum())]
    assert products.tokens[:inside] == [distinct_beginnings(batch)] * inside
    assert distinct_beginnings(batch) < 0.5 * batch.input_ids.numel()
    pass_the_ordinary_way(monkeypatch)
    expected = gradient_rows(model, batch, coefficients, passes=PassSettings(method="loop"))
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-9, atol=1e-11)


def test_backward_leaves_out_what_no_completion_token_sees(
    narrow_layers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens with a cotangent: behind the last attention those that predict, below it all that a completion token sees."""
    model, batch = adapted_llama(), shared_batch()
    bucket = length_buckets(batch)[0]
    asked: dict[str, list[int]] = {}
    original = TokenPlan.worthwhile

    def worthwhile(self: TokenPlan, tokens: Tensor, width: int, out: int) -> bool:
        kind = next(n for n in ("distinct", "seen", "predicting") if getattr(self, n) is tokens)
        asked.setdefault(kind, []).append(len(tokens))
        return original(self, tokens, width, out)

    monkeypatch.setattr(TokenPlan, "worthwhile", worthwhile)
    for _ in range(2):
        asked.clear()
        found = completion_values(model, bucket, 0.8)
        torch.autograd.grad(found.logprobs.sum(), [p for p in model.parameters() if p.requires_grad])
    # Of seven layers in each of three blocks, all but keys and values of the last see predicting tokens alone.
    assert asked["predicting"] == [len(bucket.targets)] * 5
    seen = int((batch.attention_mask.sum(1) - 1).sum())
    assert asked["seen"] == [seen] * (3 * 7 - 5)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_the_plan_against_beginnings_as_a_set(lengths: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts, completions = (
        [torch.randint(0, 2, (pair[k],), generator=generator).tolist() for pair in lengths] for k in (0, 1)
    )
    batch = SequenceBatch.from_sequences(prompts, completions, list(range(len(lengths))), 0)
    bucket = length_buckets(batch)[0]
    plan = TokenPlan(bucket)
    n, length = bucket.input_ids.shape
    rows = [(*prompts[i], *completions[i]) for i in bucket.indices.tolist()]
    beginnings = {(r, c): rows[r][: c + 1] for r in range(n) for c in range(len(rows[r]) - 1)}
    at = {(r, c): r * length + c for r, c in beginnings}
    assert len(plan.distinct) == len(set(beginnings.values()))
    assert plan.seen.tolist() == sorted(at.values())
    own = {index: beginnings[divmod(index, length)] for index in plan.distinct.tolist()}
    for place, beginning in beginnings.items():
        assert own[int(plan.distinct[plan.place[at[place]]])] == beginning
    predicting = {at[r, c] for r, c in beginnings if c >= len(prompts[int(bucket.indices[r])]) - 1}
    assert set(plan.predicting.tolist()) == predicting
    assert set(plan.others.tolist()) == set(at.values()) - predicting
    for left, right in zip(plan.checked.tolist(), plan.against.tolist(), strict=True):
        assert left != right and beginnings[divmod(left, length)] == beginnings[divmod(right, length)]


class LooksAhead(nn.Module):
    """Adds to every token something of others, between two frozen layers: of the next one, of all, or of those before."""

    def __init__(self, ahead: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(17, 6)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 17)
        self.scale = nn.Linear(6, 6)
        self.ahead = ahead
        self.double().requires_grad_(False)
        self.scale.requires_grad_(True)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.first(self.table(input_ids))
        others = {"next": x.roll(-1, 1), "all": x.mean(1, keepdim=True), "none": x.cumsum(1)}
        x = x + others[self.ahead]
        return SimpleNamespace(logits=self.head(self.scale(self.second(x)).tanh()))


@pytest.mark.parametrize("ahead", ["next", "all", "none"])
def test_a_model_that_looks_ahead_is_passed_the_ordinary_way(
    ahead: str, narrow_layers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bucket = LooksAhead(ahead), length_buckets(shared_batch())[0]
    with PassState(model) as state, state.sharing(bucket) as agreed:
        model(bucket.input_ids)
    assert agreed() == (ahead == "none")
    model = LooksAhead(ahead)
    with PassState(model):
        found = completion_values(model, bucket, 1.0)
        with ForwardProducts(model) as products:
            again = completion_values(model, bucket, 1.0)
    assert (distinct_beginnings(shared_batch()) in products.tokens) == (ahead == "none")  # remembered
    pass_the_ordinary_way(monkeypatch)
    expected = completion_values(model, bucket, 1.0)
    for one in (found, again):
        torch.testing.assert_close(one.logprobs, expected.logprobs, rtol=1e-12, atol=1e-12)


def test_layers_are_as_before_afterwards_even_where_the_pass_fails(narrow_layers: None) -> None:
    model, bucket = LooksAhead("none"), length_buckets(shared_batch())[0]
    with pytest.raises(RuntimeError, match="in the middle"), PassState(model) as state, state.sharing(bucket):
        assert "forward" in vars(model.first) and "forward" not in vars(model.table)
        raise RuntimeError("in the middle")
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_others_have_wrapped_stay_theirs(narrow_layers: None) -> None:
    class Quantized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).round()

    model, bucket = LooksAhead("none"), length_buckets(shared_batch())[0]
    theirs = vars(model.first)["forward"] = lambda x: nn.Linear.forward(model.first, x)
    model.second = Quantized(6, 6).double().requires_grad_(False)
    with PassState(model) as state, state.sharing(bucket):
        assert vars(model.first)["forward"] is theirs and "forward" not in vars(model.second)
    assert vars(model.first)["forward"] is theirs


def test_narrow_layers_and_full_rows_are_not_worth_a_copy() -> None:
    bucket = length_buckets(shared_batch())[0]
    plan = TokenPlan(bucket)
    assert plan.worthwhile(plan.distinct, 4096, 4096)
    assert not plan.worthwhile(plan.distinct, 16, 4096), "a product costs less than the copy of its result"
    assert not plan.worthwhile(plan.distinct, 4096, 16), "a product costs less than the copy of what goes into it"
    alone = TokenPlan(length_buckets(shared_batch().select([0]))[0])
    assert not alone.worthwhile(alone.seen, 256, 256)


def test_derivatives_along_a_direction_are_those_of_the_ordinary_pass(
    narrow_layers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = adapted_llama(), shared_batch()
    generator = torch.Generator().manual_seed(2)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    with ForwardProducts(model) as products:
        found = token_derivatives(model, batch, direction)
    # values and tangents; the inputs of the first block's query, key and value have no tangent
    assert products.tokens[:-2] == [distinct_beginnings(batch)] * (2 * (len(frozen_layers(model)) - 1) - 3)
    pass_the_ordinary_way(monkeypatch)
    expected = token_derivatives(model, batch, direction)
    for one, other in ((found.logprobs, expected.logprobs), (found.entropies, expected.entropies)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert other.abs().max() > 0.1


def test_coefficients_of_zero_leave_no_trace(narrow_layers: None) -> None:
    """A sequence without weight has rows of zeros, although it shares its prompt with others."""
    model, batch = adapted_llama(), shared_batch()
    c = score_coefficients(batch)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])[:, None]
    rows = gradient_rows(
        model, batch, TokenCoefficients(c.entropy, c.logprob * weights), passes=PassSettings(verify=False)
    )
    for row in rows.values():
        assert not row[[1, 3]].any() and row[[0, 2, 4, 5]].flatten(1).any(1).all()
