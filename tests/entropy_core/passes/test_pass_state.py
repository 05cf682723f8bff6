"""What passes keep of a model and put into it: opened once, joined by calls inside, and gone when it is closed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.directional import token_derivatives
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.fold_gradients import fold_gradients
from entropy_core.gradients import batch_gradients, per_sequence_gradients, stream_rows, trainable_parameters
from entropy_core.passes import frozen_head, token_plan
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.replaced_forward import ReplacedForward
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.state import PassState
from entropy_core.scores import token_statistics
from tests.entropy_core.support import right_padded
from tests.oracle.model_cases import VOCABULARY, random_sequences, randomise


@pytest.fixture(autouse=True)
def _narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as narrow as a test's share tokens as well."""
    monkeypatch.setattr(token_plan, "COPYING", 0)


def small_llama(**lora: Any) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=3, target_modules="all-linear", **lora))
    randomise(model, 1)
    return model.double().train()


def batch() -> SequenceBatch:
    return right_padded(random_sequences(VOCABULARY))


def left_on(model: nn.Module) -> dict[str, Any]:
    """All that a pass might leave on a model: tensors bit by bit, and the attributes and hooks of every module."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    modules = {}
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "_hooks" in key and value is not None}
        others = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        modules[name] = (hooks, others)
    gradients = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return {"tensors": tensors, "modules": modules, "gradients": gradients}


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = left_on(model)
    assert before["modules"] == after["modules"] and before["gradients"] == after["gradients"]
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(t, after["tensors"][name]) for name, t in before["tensors"].items())
    assert not PassState._all_open


def derivatives(method: Any) -> Callable[[nn.Module], Any]:
    def call(model: nn.Module) -> Any:
        direction = {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}
        return token_derivatives(model, batch(), direction, method=method)

    return call


def folds(model: nn.Module) -> Any:
    def objectives(statistics: Any) -> Any:
        return [entropy_coefficients(statistics, batch())]

    return fold_gradients(model, batch(), objectives, length_buckets, folds=2)


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "statistics": lambda model: token_statistics(model, batch()),
    "gradients": lambda model: batch_gradients(model, batch(), [score_coefficients(batch())]),
    "rows": lambda model: per_sequence_gradients(model, batch()),
    "rows by a loop": lambda model: per_sequence_gradients(model, batch(), PassSettings(method="loop")),
    "forward mode": derivatives("forward"),
    "central differences": derivatives("central"),
    "folds": folds,
}


@pytest.mark.filterwarnings("ignore::entropy_core.passes.row_formation.SlowRowsWarning")
@pytest.mark.parametrize("true_derivatives", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_on_the_model(call: str, true_derivatives: bool) -> None:
    model = small_llama(use_dora=true_derivatives)
    before = left_on(model)
    with PassState(model, true_derivatives=true_derivatives):
        assert left_on(model)["modules"] != before["modules"], "the test is blind"
        CALLS[call](model)
    assert_as_before(model, before)
    CALLS[call](model)  # opens one by itself
    assert_as_before(model, before)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_on_the_model_where_a_pass_raises(call: str) -> None:
    model = small_llama()

    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_pre_hook(fail)
    before = left_on(model)
    with pytest.raises(KeyError, match="in the middle"):
        CALLS[call](model)
    assert_as_before(model, before)
    with pytest.raises(KeyError, match="in the middle"), PassState(model), PassState.of(model):
        CALLS[call](model)
    assert_as_before(model, before)


def test_nothing_is_left_on_the_model_where_a_backward_pass_raises() -> None:
    model = small_llama()
    before = left_on(model)

    def sink(*_: Any) -> None:
        raise KeyError("on the way back")

    with pytest.raises(KeyError, match="on the way back"):
        stream_rows(model, batch(), [score_coefficients(batch())], sink)
    assert_as_before(model, before)


def test_nothing_is_left_on_the_model_where_opening_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    before, place, placed = left_on(model), ReplacedForward.place, []

    def fail_at_the_third(self: ReplacedForward) -> None:
        if len(placed) == 2:
            raise MemoryError
        placed.append(self)
        place(self)

    monkeypatch.setattr(ReplacedForward, "place", fail_at_the_third)
    with pytest.raises(MemoryError):
        token_statistics(model, batch())
    assert len(placed) == 2
    assert_as_before(model, before)


def test_calls_inside_join_the_state_that_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model, placed, place = small_llama(), [], ReplacedForward.place
    monkeypatch.setattr(ReplacedForward, "place", lambda self: (placed.append(self), place(self)))
    with PassState(model):
        opened = len(placed)
        for call in CALLS.values():
            call(model)
        assert len(placed) == opened > 14, "a call inside placed its own"


def test_entered_again_it_is_closed_by_the_last_exit() -> None:
    model = small_llama()
    before = left_on(model)
    state = PassState(model)
    with state:
        with state, PassState.of(model) as same:
            assert same is state
        assert left_on(model)["modules"] != before["modules"]
    assert_as_before(model, before)
    with state:  # and it can be opened again
        token_statistics(model, batch())
    assert_as_before(model, before)


@pytest.mark.parametrize("other", ["the model", "what is inside it", "what is around it"])
def test_a_second_state_of_a_model_is_refused(other: str) -> None:
    inner = small_llama()
    outer = nn.ModuleDict({"policy": inner})
    model = outer if other == "what is inside it" else inner
    second = outer if other == "what is around it" else inner
    with PassState(model) as state:
        assert PassState.of(second) is state
        with pytest.raises(RuntimeError, match=r"join it by PassState\.of"), PassState(second):
            pass
    with PassState(second):
        pass
    assert not PassState._all_open


def test_what_was_found_out_is_kept_while_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state, tried = small_llama(), None, []
    state = PassState(model)
    head = model.get_output_embeddings()
    model.base_model.model.forward = capped = _Capped(model.base_model.model)
    hidden_states = frozen_head._hidden_states
    monkeypatch.setattr(frozen_head, "_hidden_states", lambda *args: (tried.append(1), hidden_states(*args))[1])
    for _ in range(2):
        with state:
            token_statistics(model, batch())
    assert tried == [1] and state.findings.processed_logits == {head} and capped.calls == 3


class _Capped:
    """The forward of a model that caps its logits; counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output = type(self.model).forward(self.model, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        output.logits = 3.0 * (output.logits / 3.0).tanh()
        return output

    @property
    def __wrapped__(self) -> Any:  # for inspect.unwrap, as functools.wraps would have it
        return self.model.__class__.forward.__get__(self.model)


def test_a_wrapper_that_comes_while_it_is_open_stays() -> None:
    model = small_llama()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    expected = token_statistics(model, batch())
    with PassState(model):
        below = layer.forward
        theirs = layer.forward = lambda *args, **kwargs: 2.0 * below(*args, **kwargs)
        doubled = token_statistics(model, batch())
    assert layer.forward is theirs
    again = token_statistics(model, batch())
    assert not torch.allclose(doubled.logprobs, expected.logprobs)
    torch.testing.assert_close(again.logprobs, doubled.logprobs)
    del layer.forward
    torch.testing.assert_close(token_statistics(model, batch()).logprobs, expected.logprobs)


def test_adapters_and_frozen_layers_are_asked_for_at_every_pass() -> None:
    model = small_llama()
    plain, layer = token_statistics(model, batch()), model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    with PassState(model):
        with model.disable_adapter():
            base = token_statistics(model, batch())
        torch.testing.assert_close(token_statistics(model, batch()).logprobs, plain.logprobs)
        layer.base_layer.weight.requires_grad_(True)
        rows = per_sequence_gradients(model, batch())
        layer.base_layer.weight.requires_grad_(False)
    with model.disable_adapter():
        expected = token_statistics(model, batch())
    torch.testing.assert_close(base.logprobs, expected.logprobs)
    assert not torch.allclose(base.logprobs, plain.logprobs)
    (name,) = (name for name in rows if "up_proj.base_layer.weight" in name)
    assert rows[name].abs().amax() > 1e-3


def test_a_copy_made_while_it_is_open_computes_by_its_own_weights() -> None:
    model = small_llama()
    with PassState(model):
        other = copy.deepcopy(model)
    randomise(other, 5)
    fresh = small_llama()
    fresh.load_state_dict(other.state_dict())
    torch.testing.assert_close(token_statistics(other, batch()).logprobs, token_statistics(fresh, batch()).logprobs)
    assert not torch.allclose(token_statistics(model, batch()).logprobs, token_statistics(other, batch()).logprobs)


HEADS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "scaled": lambda head, x: 2.0 * nn.Linear.forward(head, x),
    "of other hidden states": lambda head, x: nn.Linear.forward(head, x * 0.5),
    "clamped": lambda head, x: nn.Linear.forward(head, x).clamp(-1.0, 1.0),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_with_somebody_elses_forward_computes_what_that_says(kind: str) -> None:
    """A frozen head is fused on its weight alone, which such a wrapper makes say something else."""
    model = small_llama()
    (bucket,) = length_buckets(batch())
    plain = completion_values(model, bucket, 0.8)
    head = model.get_output_embeddings()
    head.forward = lambda x: HEADS[kind](head, x)
    found = completion_values(model, bucket, 0.8)
    logits = model(input_ids=bucket.input_ids).logits[bucket.rows, bucket.positions] / 0.8
    expected = logits.log_softmax(1)
    assert not torch.allclose(found.logprobs, plain.logprobs)
    torch.testing.assert_close(found.logprobs, expected.gather(1, bucket.targets[:, None])[:, 0])
    assert found.entropies is not None
    torch.testing.assert_close(found.entropies, -(expected.exp() * expected).sum(1))
