"""A model cut over two devices gives the numbers of the same model on one; tensors of two devices never meet.

The second device is that of tests/two_devices.py: it has the CPU's arithmetic and CUDA's refusals.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core import directional
from entropy_core.batch import SequenceBatch
from entropy_core.gradients import per_sequence_gradients, trainable_parameters
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from entropy_experiments.checkpoint_loader import _attach_adapter
from entropy_experiments.checkpoints.offloading import read_again_in_backward
from entropy_experiments.fisher_analyzer import FisherComputation, analyze_batches
from entropy_experiments.kernel import options as kernel_options
from entropy_experiments.kernel.options import KernelOptions, held_memory
from entropy_experiments.run.self_checks import relative_error
from entropy_experiments.step import training_side
from entropy_experiments.step.real_steps import StepMeasurement
from entropy_experiments.step.settings import AnalysisSettings
from tests.two_devices import FAR, second_device

pytestmark = pytest.mark.long

NEAR, THERE = "cpu", str(FAR)
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
SECOND_LAYER = dict.fromkeys(PARTS, NEAR) | {"model.layers.1": THERE}
SECOND_HALF = SECOND_LAYER | {"model.norm": THERE, "lm_head": THERE}
HEAD_ALONE = dict.fromkeys(PARTS, NEAR) | {"lm_head": THERE}
WEIGHTS = torch.tensor([0.3, -0.1, 0.2, -0.25], dtype=torch.float64)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, tie_word_embeddings=False, **shape))
    for p in model.parameters():
        p.data.mul_(5 if p.dim() > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    lora = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base(), lora).save_pretrained(folder)
    return folder


def placed(adapter: Path, modules: dict[str, str], main: str = NEAR) -> torch.nn.Module:
    model = _attach_adapter(dispatch_model(base(), modules, main_device=main), adapter).eval()
    read_again_in_backward(model)
    return model


def optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    parameters = list(trainable_parameters(model).values())
    out = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    for p in parameters:
        moments = torch.randn(p.shape, generator=generator) * 1e-2, torch.rand(p.shape, generator=generator) * 1e-2
        out.state[p] = {
            "step": torch.tensor(3.0),
            "exp_avg": moments[0].to(p.device),
            "exp_avg_sq": (moments[1] + 1e-4).to(p.device),
        }
    return out


def batch(count: int, seed: int) -> SequenceBatch:
    tokens = torch.randint(1, 40, (count, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return SequenceBatch.from_sequences([t[:5] for t in tokens], [t[5:] for t in tokens], list(range(count)), 0)


def analyse(model: torch.nn.Module, **options: object) -> FisherComputation:
    kernel = KernelOptions(**options)
    return analyze_batches(
        model,
        optimizer(model),
        batch(6, 3),
        batch(4, 4),
        WEIGHTS,
        AnalysisSettings(passes=PassSettings(40), kernel=kernel),
    )


def array_of(found: FisherComputation, name: str) -> torch.Tensor:
    numbers = found.numbers
    return getattr(numbers.step.attribution if name == "shares" else numbers.kernels, name)


@pytest.fixture
def comparable(monkeypatch):
    """Made-up moments are recognised by nobody; and the second device has no forward mode: it is torch's own affair."""
    monkeypatch.setattr(training_side, "check_optimizer", lambda *_: [])

    def central(model, part, direction, _parameters, passes):
        return directional._central_difference(model, part, direction, passes)

    monkeypatch.setattr(directional, "_forward_mode", central)


@pytest.mark.parametrize(
    ("modules", "strategy"),
    [
        (SECOND_LAYER, "memory"),
        pytest.param(SECOND_HALF, "memory", marks=pytest.mark.long),
        (HEAD_ALONE, "memory"),
        pytest.param(SECOND_LAYER, "tiles", marks=pytest.mark.long),
        pytest.param(SECOND_LAYER, "disk", marks=pytest.mark.long),
    ],
)
def test_an_analysis_over_two_devices(adapter, tmp_path, comparable, modules, strategy):
    options = {"strategy": strategy, "disk_budget": 2**30}
    here = analyse(_attach_adapter(base(), adapter).eval(), **options, store_folder=tmp_path / "here")
    with second_device():
        model = placed(adapter, modules)
        assert {str(p.device) for p in model.parameters()} == {NEAR, THERE}
        found = analyse(model, **options, store_folder=tmp_path / "there")
    for name in ("fisher", "entropy_fisher", "train_fisher", "shares"):
        a, b = (array_of(side, name) for side in (found, here))
        # shares without kept rows come from a central difference here
        tolerance = 1e-3 if name == "shares" and strategy != "memory" else 1e-5
        assert relative_error(a, b) <= tolerance, name
    assert found.numbers.step.gradient_norm == pytest.approx(here.numbers.step.gradient_norm, rel=1e-5)
    again = found.numbers.step.predictions.per_token["rao_blackwell"]
    for part, value in here.numbers.step.predictions.per_token["rao_blackwell"].items():
        assert again[part].value == pytest.approx(value.value, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("modules", [SECOND_LAYER, SECOND_HALF, HEAD_ALONE])
def test_rows_of_all_weights_over_two_devices(modules):
    """Embeddings, norms and a trained output layer: their modules get what lay on another device a moment before."""
    expected = per_sequence_gradients(base(), batch(4, 3), passes=PassSettings(40))
    with second_device():
        found = per_sequence_gradients(
            dispatch_model(base(), modules, main_device=NEAR), batch(4, 3), passes=PassSettings(40)
        )
    for name, rows in expected.items():
        assert relative_error(found[name].to("cpu"), rows) <= 1e-5, name


def test_sketches_and_real_steps_over_two_devices(adapter, comparable):
    found = []
    for modules in (None, SECOND_LAYER):
        with second_device():
            model = placed(adapter, modules) if modules else _attach_adapter(base(), adapter).eval()
            numbers = analyse(model, projection_dim=30).numbers
            side = analyse(model, strategy="memory")
            steps = StepMeasurement(
                model,
                optimizer(model),
                side.training.rows,
                batch(6, 3),
                token_statistics(model, batch(6, 3)),
                learning_rate=0.02,  # large beside the rounding of entropies
            )
            halves = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]])
            responses = steps.response_shares(side.gradients["split"], WEIGHTS, halves)
            found.append((numbers.kernels.fisher, torch.tensor(steps.change(WEIGHTS)), responses.shares))
    for here, there in zip(*found, strict=True):
        assert relative_error(there, here) <= 1e-3


def test_layers_kept_on_the_cpu_and_computed_elsewhere(adapter, comparable):
    """Beside an accelerator, "cpu" means offloaded: the frozen weights travel for each pass, adapters stay where it computes."""
    modules = dict.fromkeys(PARTS, THERE) | {"model.layers.0": NEAR}
    here = analyse(_attach_adapter(base(), adapter).eval(), strategy="memory")
    with second_device():
        model = placed(adapter, modules, main=THERE)
        devices = {name: p.device.type for name, p in model.named_parameters()}
        found = analyse(model, strategy="memory")
    assert {kind for name, kind in devices.items() if "lora" in name} == {FAR.type}
    assert {kind for name, kind in devices.items() if "layers.0." in name and "lora" not in name} == {"meta"}
    # A share is a mean over evaluation sequences whose terms cancel: its rounding is that of the terms.
    terms = here.numbers.kernels.entropy_fisher.double()
    cancelled = float(terms.abs().mean(0).norm() / terms.mean(0).norm())
    for name, allowed in (("fisher", 1e-5), ("entropy_fisher", 1e-5), ("shares", 1e-5 * cancelled)):
        assert relative_error(array_of(found, name), array_of(here, name)) <= allowed, name


def test_the_device_with_the_least_room_for_its_share_of_the_rows_decides(adapter, monkeypatch):
    free = {NEAR: 1_000_000, THERE: 100_000}
    monkeypatch.setattr(kernel_options, "free_memory", lambda device: free[str(device)])
    with second_device():
        model = placed(adapter, SECOND_LAYER)
        assert KernelOptions()._room(model, 1000) == 2 * (0.8 * 100_000 - 1000), "half of the adapters lie there"
        assert KernelOptions(modules=["*layers.0.*"])._room(model, 1000) == 0.8 * 1_000_000 - 1000
        held = held_memory(model)
        assert abs(KernelOptions(memory_budget=2**40)._room(model, 1000) - (2**40 - held - 1000)) < 2**26


def test_the_second_device_refuses_as_cuda_does():
    with second_device():
        far = torch.ones(3, device=FAR)
        with pytest.raises(RuntimeError, match="same device"):
            far + torch.ones(3)
        assert float((far * 2.0).sum()) == 6.0 and far.to("cpu").device.type == "cpu"
