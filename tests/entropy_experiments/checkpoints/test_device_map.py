"""Base models placed by accelerate's device map: offloaded to disk, an analysis is the one of the model in memory."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entropy_core.adamw import read_adamw_state
from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.passes import frozen_head as output_head
from entropy_core.passes import state as pass_state
from entropy_core.passes.forward import input_device
from entropy_core.passes.frozen_head import completion_values
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.checkpoints.offloading import offloading_hook
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.entropy_runner import run_fisher_analysis
from rl_training.configuration import dump_config, load_config
from rl_training.errors import UserError
from rl_training.models.device_map import DeviceMap
from rl_training.train import build_trainer
from tests.entropy_experiments.small_analysis import OFF, SMALL, whole_config
from tests.tiny_policy import save_tiny_policy, tiny_train_config

pytestmark = pytest.mark.long

HALF = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
ALL_LAYERS = {"": "cpu", "model.layers": "disk", "model.norm": "disk"}


def placed_config(modules: dict, *overrides: str) -> FisherAnalysisConfig:
    small = [key for key in SMALL if not key.startswith("checkpoint.device")]
    return load_config(FisherAnalysisConfig, None, [*small, f"checkpoint.device_map={modules}", *overrides])


def batch(seed: int = 0) -> SequenceBatch:
    tokens = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return SequenceBatch.from_sequences([t[:5] for t in tokens], [t[5:] for t in tokens], list(range(6)), 0)


@pytest.mark.parametrize("modules", [{"": "cpu"}, HALF, ALL_LAYERS])
def test_a_placed_model_is_the_same_model(tiny_run, modules):
    here = load_checkpoint(tiny_run, device="cpu")
    placed = load_checkpoint(tiny_run, device_map=DeviceMap(modules))
    offloaded = [name for name, p in placed.model.named_parameters() if p.device.type == "meta"]
    assert bool(offloaded) == ("disk" in modules.values())
    assert not any("lora" in name for name in offloaded)
    weights, found = trainable_parameters(here.model), trainable_parameters(placed.model)
    assert weights.keys() == found.keys()
    assert all(torch.equal(found[name], p) and found[name].dtype == p.dtype for name, p in weights.items())
    moments, expected = (read_adamw_state(c.optimizer, trainable_parameters(c.model)) for c in (placed, here))
    assert all(torch.equal(moments[name].exp_avg_sq, s.exp_avg_sq) for name, s in expected.items())
    assert input_device(placed.model).type == "cpu"
    gradients = [batch_gradients(c.model, batch(), [score_coefficients(batch())])[0] for c in (here, placed)]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


EVERYTHING = {"": "disk"}


@pytest.mark.parametrize("modules", [HALF, EVERYTHING])
def test_an_analysis_of_an_offloaded_model_is_that_of_the_model_in_memory(tiny_run, tmp_path, modules, monkeypatch):
    switches = ("entropy_analysis.analysis.intervention_subsets=4", "entropy_analysis.analysis.fresh_scales=[1.0]")
    if modules is EVERYTHING:
        # an offloaded output layer makes whole logits, offloaded adapters call one module after the other: others round
        # in another way
        monkeypatch.setattr(output_head, "_may_be_fused", lambda layer: False)
        monkeypatch.setattr(pass_state, "plain_adapter", lambda layer: None)
        switches = tuple(f"entropy_analysis.analysis.{name}=false" for name in OFF)
    monkeypatch.chdir(tmp_path)
    files = _digests(tiny_run.parent)
    here = run_fisher_analysis(tiny_run, whole_config(*switches), folder=tmp_path / "here")
    placed = run_fisher_analysis(tiny_run, placed_config(modules, *switches), folder=tmp_path / "placed")
    assert _digests(tiny_run.parent) == files and {p.name for p in tmp_path.iterdir()} == {"here", "placed"}
    assert placed.evaluation.completion_ids == here.evaluation.completion_ids, "the same draw"
    assert not placed.failed_checks and not placed.failed_analyses
    kernels = [load_file(analysis.folder / "kernel.safetensors") for analysis in (here, placed)]
    for name, matrix in kernels[0].items():
        error = (kernels[1][name] - matrix).norm() / matrix.norm()
        assert error <= 1e-6, f"{name}: {error:.1e}"
    again = placed.numbers.step.predictions.per_token["rao_blackwell"]
    for part, value in here.numbers.step.predictions.per_token["rao_blackwell"].items():
        assert again[part].value == pytest.approx(value.value, rel=1e-5, abs=1e-9)
    for found, expected in zip(placed.numbers.step.measured, here.numbers.step.measured, strict=True):
        assert found.fixed_prefix.change == pytest.approx(expected.fixed_prefix.change, rel=1e-3, abs=1e-7)


def test_graphs_keep_no_offloaded_weight(tiny_run):
    """What is offloaded need not fit into memory for a backward pass: each weight is read again when it is its turn."""
    model = load_checkpoint(tiny_run, device_map=DeviceMap(ALL_LAYERS)).model
    shapes = {p.shape for p in model.parameters() if p.device.type == "meta" and p.dim() == 2}
    hooks = [hook for module in model.modules() if (hook := offloading_hook(module)) is not None]

    def alive() -> int:
        gc.collect()
        tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type != "meta")
        return sum(t.shape in shapes or t.T.shape in shapes for t in tensors if t.dim() == 2)

    before = alive()
    (bucket,) = length_buckets(batch(), 2048)
    with torch.enable_grad():
        total = completion_values(model, bucket, 1.0).logprobs.sum()
    assert total.requires_grad and alive() == before
    read: list[str] = []
    for hook in hooks:
        hook.weights_map = _Counted(hook.weights_map, read)
    total.backward()
    assert len(read) == 15, "the 14 matrices and 5 norms of two layers, but for the 3 and 1 before the first adapter"


class _Counted(dict):
    def __init__(self, inner: dict, read: list[str]) -> None:
        self.inner, self.read = inner, read

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.inner[name]


def _digests(folder: Path) -> dict[str, str]:
    """PEFT's own way of loading would write a changed copy of the base model's files."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_map_that_chooses_itself_keeps_to_its_memory(tiny_run):
    model = load_checkpoint(tiny_run, device_map=DeviceMap("auto", {"cpu": 60_000})).model
    kept = {p.device.type for name, p in model.named_parameters() if "lora" not in name}
    assert kept == {"cpu", "meta"}, "what is over 60 kB goes to disk"
    assert all(p.device.type == "cpu" for p in trainable_parameters(model).values())


def test_full_fine_tuning_cannot_be_offloaded(tmp_path):
    policy = save_tiny_policy(tmp_path / "policy")
    sections = {
        "lora": {"enabled": False},
        "training": {"steps": 1, "save_every": 1},
        "entropy_probe": {"enabled": False},
    }
    trainer, _ = build_trainer(tiny_train_config(policy, tmp_path / "run", **sections))
    trainer.train()
    with pytest.raises(
        UserError, match="offloads 9 of the 20 parameters .* cannot be trained: give their modules a device"
    ):
        load_checkpoint(tmp_path / "run", device_map=DeviceMap(HALF))
    assert len(trainable_parameters(load_checkpoint(tmp_path / "run", device_map=DeviceMap({"": "cpu"})).model)) == 20


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"": "cpu", "model.layer.1": "disk"}, "no module 'model.layer.1'; did you mean 'model.layers.1'"),
        ({"model.layers": "cpu"}, "no device for 'model.embed_tokens.weight': name its module"),
        ({"": 7}, r"no device 7: this machine has \d+ CUDA devices"),
        ({"": "cuda:7"}, r"no device 'cuda:7': this machine has \d+ CUDA devices"),
        ({"": "tape"}, "'tape' is no device: write 0 .* cpu or disk"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tiny_run, modules, message):
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(tiny_run, device_map=DeviceMap(modules))
    assert "\n" not in str(caught.value) and "checkpoint.model" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cpu", "device_map=auto"], "device and device_map both say"),
        (["max_memory={0: 1GiB}"], "max_memory is for a device_map that is chosen by itself"),
        (["offload_folder=x"], "set device_map"),
        (["device_map=cuda"], "checkpoint.device_map should be 'auto', 'balanced' or 'sequential'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(FisherAnalysisConfig, None, [f"checkpoint.{override}" for override in overrides])


def test_maps_are_written_and_read_back_as_they_are(tmp_path):
    for overrides in (
        ["device_map={model.layers.0: 0, '': cpu}"],
        ["device_map=auto", "max_memory={0: 20GiB, cpu: 1TiB}"],
    ):
        config = load_config(FisherAnalysisConfig, None, [f"checkpoint.{override}" for override in overrides])
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(FisherAnalysisConfig, tmp_path / "config.yaml") == config
    assert config.checkpoint.max_memory == {0: 20 * 2**30, "cpu": 2**40}
