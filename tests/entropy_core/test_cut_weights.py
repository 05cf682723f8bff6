"""A model that fully_shard has cut over processes gives the kernel, gradients and derivatives of the whole model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.cut_weights import weights_cut
from entropy_core.directional import token_derivatives, weights_moved
from entropy_core.entropy import score_coefficients
from entropy_core.formed import dot, whole
from entropy_core.gradients import batch_gradients, entropy_gradient, per_sequence_gradients, trainable_parameters
from entropy_core.kernel import compute_kernels
from entropy_core.passes.row_formation import Method, RowFormation
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from tests.two_processes import in_two_processes

PASSES = PassSettings(64)


def full_model(seed: int = 0) -> nn.Module:
    """Every weight is trained; 31 tokens and 23 inner units leave a rest by two and by three."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.mul_(3.0 if p.dim() > 1 else 1.0)
    return model.eval()


def adapted_model() -> nn.Module:
    """LoRA of rank 2: a third process has nothing of a factor A."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        full_model(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    return model.eval()


def cut(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def batch(count: int, seed: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 31, (count, 9), generator=generator).tolist()
    lengths = [3 + k % 3 for k in range(count)]
    pairs = [(t[:4], t[4 : 4 + n]) for t, n in zip(tokens, lengths, strict=True)]
    return SequenceBatch.from_sequences([p for p, _ in pairs], [c for _, c in pairs], [k // 2 for k in range(count)], 0)


def numbers(model: nn.Module, method: Method = "auto") -> dict[str, Tensor]:
    """What one process finds, whole."""
    passes = PassSettings(64, method=RowFormation(method))
    evaluation, training = batch(5, 1), batch(6, 2)
    own = trainable_parameters(model)
    p = {name: 1.0 / (0.1 + q.detach().abs()) for name, q in own.items()}
    kernels = compute_kernels(model, evaluation, training, p, passes=passes)
    out = {"K1": kernels.fisher, "KH": kernels.entropy_fisher}
    gradient = batch_gradients(model, training, [score_coefficients(training)], passes)[0]
    towards = entropy_gradient(model, evaluation, passes=passes)
    rows = per_sequence_gradients(model, training, passes)
    for name in own:
        out[f"gradient of {name}"] = whole(gradient)[name]
        out[f"row sum of {name}"] = whole({name: rows[name].sum(0)})[name]
    out["dot"] = torch.tensor(dot(towards, gradient))
    with weights_moved(model, gradient, 1e-2):
        out["moved"] = token_statistics(model, evaluation, passes).logprobs
    out["restored"] = token_statistics(model, evaluation, passes).logprobs
    out["derivative"] = token_derivatives(model, evaluation, gradient, passes, "central").logprobs
    return out


def of_the_cut(make: Callable[[], nn.Module], method: Method = "auto") -> dict[str, Tensor]:
    model = make()
    cut(model)
    with weights_cut(model) as opened:
        held = sum(p.numel() for p in opened.own.values())
        everything = sum(p.numel() for p in opened.spread.values())
        assert held <= everything / dist.get_world_size() + 40 * 31, "each process holds its part alone"
        return numbers(model, method)


def full_cut() -> dict[str, Tensor]:
    return of_the_cut(full_model)


def adapted_cut() -> dict[str, Tensor]:
    return of_the_cut(adapted_model)


def full_cut_by_loop() -> dict[str, Tensor]:
    return of_the_cut(full_model, "loop")


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 2e-3 if name == "derivative" else 1e-5
        off = (found[name].double() - value.double()).norm() / value.double().norm()
        assert off < tolerance, f"{name} is off by {off:.1e}"
    assert not torch.allclose(expected["moved"], expected["restored"], atol=1e-4)


def test_two_processes_have_the_kernel_of_one() -> None:
    expected = numbers(full_model())
    for found in in_two_processes(full_cut):
        assert_the_same(found, expected)


@pytest.mark.long
@pytest.mark.parametrize(("make", "work"), [(full_model, full_cut), (adapted_model, adapted_cut)])
def test_three_processes_have_the_kernel_of_one(make, work) -> None:
    expected = numbers(make())
    for found in in_two_processes(work, 3):
        assert_the_same(found, expected)


@pytest.mark.long
def test_sequence_by_sequence_the_same() -> None:
    expected = numbers(full_model(), "loop")
    for found in in_two_processes(full_cut_by_loop):
        assert_the_same(found, expected)


def _misuses() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    said = []

    def note(call: Callable[[], object]) -> None:
        with pytest.raises(ValueError) as raised:
            call()
        said.append(str(raised.value))

    model = full_model()
    note(lambda: weights_cut(model).__enter__())
    cut(model)
    note(lambda: per_sequence_gradients(model, batch(2, 1), PASSES))
    note(lambda: batch_gradients(model, batch(2, 1), [score_coefficients(batch(2, 1))], PASSES))
    with weights_cut(model):
        gradient = {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}
        note(lambda: token_derivatives(model, batch(2, 1), gradient, PASSES, "forward"))
    replicated = full_model()
    fully_shard(replicated, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    note(lambda: weights_cut(replicated).__enter__())
    return said


def test_what_cannot_be_done_is_said() -> None:
    first, second = in_two_processes(_misuses)
    assert first == second
    whole_model, rows, gradients, forward, replicas = first
    assert "not cut over processes" in whole_model
    assert "weights_cut(model)" in rows and rows == gradients
    assert "method='central'" in forward
    assert "no replicas" in replicas
