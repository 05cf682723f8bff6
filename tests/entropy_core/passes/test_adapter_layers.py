"""LoRA layers as one operation: its derivatives, which layers it stands for, and what happens where it may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft.tuners.lora.layer as lora
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import length_buckets
from entropy_core.gradients import batch_gradients, per_sequence_gradients, score_coefficients
from entropy_core.passes import lora as adapter_layers
from entropy_core.passes import state as pass_state
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.lora import _AdaptedLinear, plain_adapter
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.shared_pass import Findings, SharedPass
from entropy_core.passes.state import PassState
from tests.entropy_core.support import right_padded
from tests.oracle.comparison import assert_close, relative_error
from tests.oracle.enumeration import flatten_rows
from tests.oracle.model_cases import CASES, VOCABULARY, random_sequences, randomise

BY_NAME = {case.name: case for case in CASES}


def adapters(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


def small_llama(**settings: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules="all-linear", **settings))
    randomise(model, 1)
    return model.eval()


@dataclass
class Calls:
    """How often the modules of A were called."""

    number: int = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Calls:
        original = lora.Linear.forward

        def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.number += x.shape[:2] != (1, adapter_layers._PROBE_TOKENS)
            return original(layer, x, *args, **kwargs)

        monkeypatch.setattr(lora.Linear, "forward", forward)
        return self


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_derivatives_are_those_of_the_formula(bias: bool) -> None:
    """Backward and forward mode, against finite differences in float64."""
    batch = right_padded(random_sequences(VOCABULARY)).select([2])
    current = SharedPass(length_buckets(batch)[0], Findings())
    layer = lora.Linear(nn.Linear(6, 5, bias=bias), "default", LoraConfig(r=3, lora_alpha=7), r=3, lora_alpha=7)
    layer.double().eval().base_layer.requires_grad_(False)
    randomise(layer, 2)
    factors = plain_adapter(layer)
    assert factors is not None and factors.scaling == 7 / 3
    x = torch.randn(
        *current.plan.shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    a, b = (p.detach().clone().requires_grad_() for p in (factors.a.weight, factors.b.weight))

    def both(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return _AdaptedLinear.apply(x, a, b, None, layer, factors, current, None)

    torch.testing.assert_close(both(x, a, b), layer(x))
    # without compact products: single tokens moved by finite differences are not equal any more
    assert torch.autograd.gradcheck(both, (x, a, b), check_forward_ad=True, check_batched_grad=False)


@pytest.mark.parametrize("name", ["llama_tied_lora", "qwen2_biases_lora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_pass_calls_no_adapter_and_has_the_ordinary_gradients(name: str, dtype: torch.dtype, monkeypatch) -> None:
    model, batch = BY_NAME[name].make(torch.float64), right_padded(random_sequences(VOCABULARY))
    expected = flatten_rows(per_sequence_gradients(model, batch, passes=PassSettings(method="loop")))
    model.to(dtype)
    assert len(adapters(model)) == 14 and all(plain_adapter(layer) for layer in adapters(model))
    calls = Calls().watch(monkeypatch)

    def errors() -> list[float]:
        rows = flatten_rows(per_sequence_gradients(model, batch, passes=PassSettings(verify=dtype != torch.bfloat16)))
        gradient = batch_gradients(model, batch, [score_coefficients(batch)])[0]
        whole = flatten_rows({name: g[None] for name, g in gradient.items()})[0]
        return [relative_error(rows, expected), relative_error(whole, expected.sum(0))]

    found = errors()
    assert calls.number == 0, "a layer went the ordinary way"
    monkeypatch.setattr(pass_state, "plain_adapter", lambda layer: None)
    ordinary = errors()
    assert calls.number > 0
    for error, other in zip(found, ordinary, strict=True):
        assert error <= 2 * other


def test_rows_of_one_factor_alone() -> None:
    model, batch = BY_NAME["llama_tied_lora"].make(), right_padded(random_sequences(VOCABULARY))
    expected = per_sequence_gradients(model, batch, passes=PassSettings(method="loop"))
    for factor, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        for name, p in model.named_parameters():
            p.requires_grad_(factor in name)
        found = per_sequence_gradients(model, batch)
        assert found.keys() == {name for name in expected if other not in name}
        for name, rows in found.items():
            torch.testing.assert_close(rows, expected[name], rtol=1e-9, atol=1e-11)


def _two(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    randomise(model, 3)
    model.base_model.set_adapter(["default", "second"])


def _hook(model: Any) -> None:
    for layer in adapters(model):
        layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)


def _base_hook(model: Any) -> None:
    for layer in adapters(model):
        layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _replaced(model: Any) -> None:
    for layer in adapters(model):
        layer.lora_B["default"].forward = lambda x, module=layer.lora_B["default"]: nn.Linear.forward(module, x) * 2


def _replaced_whole(model: Any) -> None:
    for layer in adapters(model):
        layer.forward = lambda x, layer=layer: lora.Linear.forward(layer, x) * 2


def _trained_base(model: Any) -> None:
    for layer in adapters(model):
        layer.base_layer.weight.requires_grad_(True)


def _mixed_types(model: Any) -> None:
    for layer in adapters(model):
        layer.lora_A.double(), layer.lora_B.double()


ORDINARY: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "DoRA": ({"use_dora": True}, lambda model: None),
    "bias of B": ({"lora_bias": True}, lambda model: None),
    "two adapters": ({}, _two),
    "a hook on A": ({}, _hook),
    "a hook on the base layer": ({}, _base_hook),
    "another forward of B": ({}, _replaced),
    "another forward": ({}, _replaced_whole),
    "a trained base layer": ({}, _trained_base),
    "two precisions": ({}, _mixed_types),
    "merged": ({}, lambda model: model.merge_adapter()),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "dropout at work": ({"lora_dropout": 0.5}, lambda model: model.train()),
}


@pytest.mark.parametrize("what", ORDINARY)
def test_what_is_more_than_one_plain_adapter_goes_the_ordinary_way(what: str, monkeypatch) -> None:
    settings, change = ORDINARY[what]
    model, bucket = small_llama(**settings), length_buckets(right_padded(random_sequences(VOCABULARY)))[0]
    plain = small_llama()
    change(model)
    assert not any(plain_adapter(layer) for layer in adapters(model)) and all(plain_adapter(m) for m in adapters(plain))
    if what == "dropout at work":
        return
    calls, before = Calls().watch(monkeypatch), [vars(layer).get("forward") for layer in adapters(model)]
    with torch.no_grad():
        found = completion_values(model, bucket, 1.0).logprobs
        called = calls.number
        assert [vars(layer).get("forward") for layer in adapters(model)] == before
        expected = model(input_ids=bucket.input_ids).logits.log_softmax(-1)[bucket.rows, bucket.positions]
    assert called == 14
    torch.testing.assert_close(found, expected.gather(1, bucket.targets[:, None]).squeeze(1), rtol=1e-5, atol=1e-5)


def test_a_layer_that_computes_something_else_is_found_out(monkeypatch) -> None:
    """A future peft, say, whose layer does more with the same names."""
    original = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, *args: original(self, x, *args) * 1.5)
    model, batch = small_llama().double(), right_padded(random_sequences(VOCABULARY))
    assert all(plain_adapter(layer) for layer in adapters(model))
    with PassState(model) as state:
        rows = flatten_rows(per_sequence_gradients(model, batch))
    assert state.findings.adapters == dict.fromkeys(adapters(model), False), "it is not remembered"
    monkeypatch.setattr(pass_state, "plain_adapter", lambda layer: None)
    assert_close(
        rows, flatten_rows(per_sequence_gradients(model, batch, passes=PassSettings(method="loop"))), 1e-9, "rows"
    )


class Twice(nn.Module):
    """Its adapter is called twice a pass, the second time with what `other` makes of x."""

    def __init__(self, other: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.layer = lora.Linear(nn.Linear(4, 4), "default", LoraConfig(r=2), r=2, lora_alpha=2).double().eval()
        self.layer.base_layer.requires_grad_(False)
        self.other, self.options = other, options
        randomise(self, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(self.other(x), **self.options)


@pytest.mark.parametrize("kind", ["the same", "half the sequences", "named adapters"])
def test_calls_that_the_plan_does_not_fit_go_the_ordinary_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = length_buckets(right_padded(random_sequences(VOCABULARY)))[0]
    options = {"adapter_names": ["__base__"] * len(bucket.indices)} if kind == "named adapters" else {}
    model = Twice(lambda x: x[::2] if kind == "half the sequences" else -x, **options)
    calls = Calls().watch(monkeypatch)
    shared = torch.randn(VOCABULARY, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = shared[bucket.input_ids].cumsum(1)  # equal where beginnings are
    with PassState(model) as state, state.sharing(bucket):
        found = model(x)
    assert calls.number == (kind != "the same")
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_found_out_stays_out_for_the_rest_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, *args: original(self, x, *args) * 1.5)
    model, bucket = Twice(lambda x: -x), length_buckets(right_padded(random_sequences(VOCABULARY)))[0]
    x = torch.ones(*bucket.input_ids.shape, 4, dtype=torch.float64)
    with PassState(model) as state, state.sharing(bucket):
        found = model(x)
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("why", ["autocast", "several completions a row"])
def test_passes_that_have_no_plan(why: str) -> None:
    model, batch = small_llama(), right_padded(random_sequences(VOCABULARY))
    bucket = length_buckets(batch)[0]
    if why != "autocast":
        n, length = bucket.input_ids.shape
        bucket = replace(bucket, attention_mask=torch.zeros(n, 1, length, length))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast")
    with autocast, PassState(model) as state, state.sharing(bucket):
        assert state._current is None
