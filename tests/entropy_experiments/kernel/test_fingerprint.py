"""The fingerprint changes with everything that gradients depend on, and with nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.gradients import per_sequence_gradients
from entropy_experiments.kernel.store.fingerprint import Fingerprint, store_fingerprint
from tests.entropy_core.support import left_padded, padded, right_padded
from tests.entropy_experiments.store_cases import in_process
from tests.oracle.model_cases import CASES, ModelCase, random_sequences
from tests.two_processes import in_two_processes

LORA = next(case for case in CASES if case.name == "llama_untied_lora")


def lora_model() -> nn.Module:
    return LORA.make(torch.float32)


def batch() -> SequenceBatch:
    return right_padded(random_sequences(LORA.vocabulary, seed=1), temperature=0.8)


def trainable_and_frozen(model: nn.Module) -> tuple[str, str]:
    names = dict(model.named_parameters())
    return next(n for n, p in names.items() if p.requires_grad), next(
        n for n, p in names.items() if not p.requires_grad
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_same_model_and_batch_have_the_same_fingerprint(case: ModelCase) -> None:
    lists = random_sequences(case.vocabulary, seed=1)
    first = store_fingerprint(case.make(torch.float32), right_padded(lists), "score")
    again = store_fingerprint(case.make(torch.float32), right_padded(lists), "score")
    assert first == again and first.difference(again) is None
    assert Fingerprint.from_json(json.loads(json.dumps(first.to_json()))) == first


def print_fingerprint(path: str) -> None:
    torch.set_num_threads(1)
    with open(path, "w") as file:
        json.dump(store_fingerprint(lora_model(), batch(), "score").to_json(), file)


def test_another_process_finds_the_same(tmp_path) -> None:
    """No hash of Python's own, which are salted anew in every process, is inside; sets have no order."""
    path = tmp_path / "fingerprint.json"
    assert in_process(print_fingerprint, str(path)) == 0
    found = Fingerprint.from_json(json.loads(path.read_text()))
    assert found.difference(store_fingerprint(lora_model(), batch(), "score")) is None


def test_padding_and_order_of_memory_change_nothing() -> None:
    model, lists = lora_model(), random_sequences(LORA.vocabulary, seed=1)
    expected = store_fingerprint(model, right_padded(lists), "score")
    n = len(lists.prompt_ids)
    for other in (left_padded(lists), left_padded(lists, pad_token=5), padded(lists, list(range(n)), [3] * n, 2)):
        assert store_fingerprint(model, other, "score").difference(expected) is None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.T.contiguous().T
    assert store_fingerprint(model, right_padded(lists), "score").difference(expected) is None
    model.train()
    assert store_fingerprint(model, right_padded(lists), "score").difference(expected) is None


def _last_bit(model: nn.Module, number: int) -> None:
    name = trainable_and_frozen(model)[number]
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        flat = parameter.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))


def _more_alpha(model: nn.Module) -> None:
    model.peft_config["default"].lora_alpha = 7


def _hotter_rope(model: nn.Module) -> None:
    model.config.rms_norm_eps = 0.5


def _freeze(model: nn.Module) -> None:
    dict(model.named_parameters())[trainable_and_frozen(model)[0]].requires_grad_(False)


MODELS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "trainable": (lambda model: _last_bit(model, 0), "the trainable parameter '{0}' has other values now than there"),
    "frozen": (lambda model: _last_bit(model, 1), "the frozen weight '{1}' has other values now than there"),
    "froze": (_freeze, "the trainable parameter '{0}' is there there, but not now"),
    "adapter": (_more_alpha, "the model's setting adapter.default.lora_alpha is 7 now, 6 there"),
    "config": (_hotter_rope, "the model's setting config.rms_norm_eps is 0.5 now, 1e-06 there"),
    "dtype": (lambda model: model.to(torch.bfloat16) and None, "is bfloat16["),
}


@pytest.mark.parametrize("what", MODELS)
def test_another_model_is_named_by_its_first_difference(what: str) -> None:
    model = lora_model()
    names = trainable_and_frozen(model)
    before = store_fingerprint(model, batch(), "score")
    change, message = MODELS[what]
    change(model)
    after = store_fingerprint(model, batch(), "score")
    assert message.format(*names) in (after.difference(before) or "nothing")
    assert after.model_difference(before) == after.difference(before)


def _with(**changes: object) -> Callable[[SequenceBatch], SequenceBatch]:
    return lambda old: replace(old, **{name: change(old) for name, change in changes.items()})  # type: ignore[operator]


def _other_token(old: SequenceBatch) -> torch.Tensor:
    ids = old.input_ids.clone()
    ids[-1, int(old.attention_mask[-1].nonzero()[0, 0])] += 1
    return ids


def _longer_completion(old: SequenceBatch) -> torch.Tensor:
    """One prompt token counted to the completion."""
    mask = old.completion_mask.clone()
    row = int((old.attention_mask.sum(1) - old.completion_lengths).argmax())
    mask[row, int(mask[row].nonzero()[0, 0]) - 1] = True
    return mask


BATCHES: dict[str, tuple[Callable[[SequenceBatch], SequenceBatch], str]] = {
    "fewer": (lambda old: old.select([0, 1]), "the batch's sequences: 2 now, 7 there"),
    "order": (lambda old: old.select(list(range(len(old)))[::-1]), "the batch's lengths differ"),
    "temperature": (_with(temperature=lambda old: 1.0), "the batch's temperature: 1.0 now, 0.8 there"),
    "token": (_with(input_ids=_other_token), "the batch's token ids differ"),
    "mask": (_with(completion_mask=_longer_completion), "the batch's completion lengths differ"),
    "prompts": (_with(prompt_index=lambda old: old.prompt_index + 1), "the batch's prompt_index differ"),
}


@pytest.mark.parametrize("what", BATCHES)
def test_another_batch_is_named_by_its_first_difference(what: str) -> None:
    model, (change, message) = lora_model(), BATCHES[what]
    before, after = (store_fingerprint(model, b, "score") for b in (batch(), change(batch())))
    assert after.difference(before) == message
    assert after.model_difference(before) is None


def test_another_objective_is_named() -> None:
    model = lora_model()
    score = store_fingerprint(model, batch(), "score")
    entropy = store_fingerprint(model, batch(), "entropy", estimator="rao_blackwell", per_token=True)
    other = store_fingerprint(model, batch(), "entropy", estimator="rao_blackwell", per_token=False)
    assert entropy.difference(score) == "the objective's kind is entropy now, score there"
    assert other.difference(entropy) == "the objective's per_token is False now, True there"
    plain = store_fingerprint(model, batch(), "entropy")
    assert plain.difference(entropy) == "the objective's estimator is None now, rao_blackwell there"


def test_every_setting_that_moves_gradients_moves_the_fingerprint() -> None:
    """Weights alone do not make a model: the same ones under other settings give other rows."""
    shape = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    lists = right_padded(random_sequences(37, seed=1))
    models = []
    for changed in ({}, {"rms_norm_eps": 1e-2}, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **changed}, bos_token_id=1, eos_token_id=2))
        for parameter in model.parameters():  # far from their initialisation, or positions hardly matter
            parameter.data.mul_(3)
        models.append(model)
    first, *others = [(store_fingerprint(m, lists, "score"), per_sequence_gradients(m, lists)) for m in models]
    for fingerprint, rows in others:
        assert any(not torch.allclose(rows[name], first[1][name]) for name in rows)
        assert fingerprint.parameters == first[0].parameters
        assert fingerprint.model_difference(first[0]) is not None


def test_what_moves_no_gradient_is_left_out() -> None:
    model = lora_model()
    before = store_fingerprint(model, batch(), "score")
    model.config.use_cache = not model.config.use_cache
    model.config._name_or_path = "elsewhere"
    model.config.pad_token_id = 3
    model.peft_config["default"].base_model_name_or_path = "elsewhere"
    model.peft_config["default"].inference_mode = True
    assert store_fingerprint(model, batch(), "score") == before


def test_settings_that_one_library_version_alone_knows_are_no_difference() -> None:
    """A newer transformers writes more keys; the weights and what both know decide."""
    old = store_fingerprint(lora_model(), batch(), "score")
    new = replace(old, settings={**old.settings, "config.new_key": "1"})
    assert new.difference(old) is None and old.difference(new) is None


def test_offloaded_weights_count_by_name_and_shape() -> None:
    model = lora_model()
    before = store_fingerprint(model, batch(), "score")
    module = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    assert store_fingerprint(model, batch(), "score").difference(before) is None
    module.weight = nn.Parameter(torch.empty((3, 4), device="meta"), requires_grad=False)
    assert "[3, 4] now" in (store_fingerprint(model, batch(), "score").difference(before) or "")


def test_saved_buffers_count_and_computed_ones_do_not() -> None:
    model = lora_model()
    model.register_buffer("scale", torch.ones(3))
    model.register_buffer("computed", torch.ones(3), persistent=False)
    before = store_fingerprint(model, batch(), "score")
    model.get_buffer("computed").zero_()
    assert store_fingerprint(model, batch(), "score").difference(before) is None
    model.get_buffer("scale").zero_()
    assert "frozen weight 'scale' has other values" in (
        store_fingerprint(model, batch(), "score").difference(before) or ""
    )


def _two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    return model


def sharded_fingerprint() -> Fingerprint:
    model = _two_layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return store_fingerprint(model, batch(), "score")


def test_sharded_weights_have_the_fingerprint_of_whole_ones() -> None:
    expected = store_fingerprint(_two_layers(), batch(), "score")
    assert in_two_processes(sharded_fingerprint) == [expected, expected]


@pytest.mark.parametrize("broken", [None, {}, {"parameters": {}}, "text"])
def test_what_is_no_fingerprint_is_refused(broken: object) -> None:
    with pytest.raises(ValueError, match="not a fingerprint"):
        Fingerprint.from_json(broken)  # type: ignore[arg-type]
    whole = store_fingerprint(lora_model(), batch(), "score").to_json()
    with pytest.raises(ValueError, match="batch is broken"):
        Fingerprint.from_json(whole | {"batch": {"sequences": 3}})


def test_cost() -> None:
    """Seventeen million trainable parameters, an eighth of SmolLM2-135M, in an eighth of a second; twice that allowed."""
    model = nn.Linear(4096, 4096, bias=False)
    store_fingerprint(model, batch(), "score")
    start = time.process_time()
    store_fingerprint(model, batch(), "score")
    assert time.process_time() - start < 0.25
