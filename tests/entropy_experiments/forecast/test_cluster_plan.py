"""The plan on paper: operations counted on the meta device are those of the passes, and what limits it follows from sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from entropy_core import SequenceBatch
from entropy_core.gradients import per_sequence_gradients
from entropy_core.passes.settings import PassSettings
from entropy_experiments.cli import app
from entropy_experiments.forecast.cluster import DEVICE_MEMORY, plan_model
from entropy_experiments.forecast.pass_costs import count_passes
from rl_training.errors import UserError
from tests.entropy_experiments.small_analysis import whole_config

pytestmark = pytest.mark.long

SHAPE = {"vocab_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def adapted(device: str, width: int = 64, layers: int = 2):
    eager = {"attn_implementation": "eager"}  # torch counts no operations of its fused attention on a CPU
    config = LlamaConfig(**SHAPE, **eager, hidden_size=width, num_hidden_layers=layers, tie_word_embeddings=False)
    with torch.device(device):
        model = LlamaForCausalLM(config).requires_grad_(False)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, lora, low_cpu_mem_usage=device == "meta")


def test_counted_operations_are_those_of_the_passes() -> None:
    prompt, completion = 9, 23
    costs = count_passes(adapted("meta"), prompt, completion)
    batch = SequenceBatch.from_sequences([[5] * prompt], [[7] * completion], [0], 0)
    with FlopCounterMode(display=False) as counter:
        rows = per_sequence_gradients(adapted("cpu"), batch, PassSettings(method="hooks", verify=False))
    assert costs.forward + costs.backward == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert costs.row_bytes == sum(4 * row[0].numel() for row in rows.values()) == 4 * costs.parameters
    longer = count_passes(adapted("meta"), 2 * prompt, 2 * completion)
    assert 1.9 * costs.graph_bytes < longer.graph_bytes < 4 * costs.graph_bytes and costs.graph_bytes > 0
    few = count_passes(adapted("meta"), prompt, completion, {n for n in rows if "lora_B" in n})
    assert few.backward < costs.backward and few.forward == costs.forward and few.parameters < costs.parameters


def test_what_limits_a_plan_follows_from_its_sizes() -> None:
    model = adapted("meta", 256, 4)
    per_row = count_passes(model, 16, 16).row_bytes

    def plan(n_train: int, *more: str, devices: int = 4, memory: int = DEVICE_MEMORY):
        sizes = (f"entropy_analysis.eval_batch_size={n_train // 8}", f"entropy_analysis.train_batch_size={n_train}")
        budget = f"entropy_analysis.fisher_kernel.memory_budget={memory}"
        return plan_model(model, whole_config(*sizes, budget, *more), devices, 1e9, 16, 16)

    small = plan(64)
    assert small.kernel.strategy == "memory" and small.group == 1 and small.workers == 4
    assert small.seconds["exchanging and reading rows"] == pytest.approx(64 * per_row / 1e9)
    tight = small.memory - small.left + 2000 * per_row
    tiled = plan(20_000, memory=tight)
    assert tiled.kernel.strategy == "tiles" and tiled.seconds["exchanging and reading rows"] == 0
    stored = plan(20_000, "entropy_analysis.fisher_kernel.disk_budget=80TB", memory=tight)
    assert stored.kernel.strategy == "disk" and stored.limit == "exchanging and reading rows"
    rows = plan(20_000, "entropy_analysis.fisher_kernel.compute_full=false", memory=tight)
    assert rows.seconds["products of rows"] == 0 and sum(rows.seconds.values()) < sum(tiled.seconds.values())
    twice = plan(20_000, devices=8, memory=tight)
    name = "passes of the sides that stream past them"
    assert twice.seconds[name] == pytest.approx(tiled.seconds[name] / 2)
    cut = plan(64, memory=int(0.7 * (small.memory - small.left)))
    assert cut.group > 1 and cut.workers == 4 // cut.group
    with pytest.raises(UserError, match="more devices, or fewer parameters"):
        plan(64, memory=small.costs.weight_bytes // 8)


def test_a_model_that_is_trained_whole_is_planned_by_its_factors() -> None:
    config = LlamaConfig(**SHAPE, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    sizes = ("entropy_analysis.eval_batch_size=8", "entropy_analysis.train_batch_size=200")

    def plan(*more: str):
        return plan_model(model, whole_config(*sizes, *more), 2, 1e9, 2, 2)

    row = count_passes(model, 2, 2).row_bytes
    kernel = "entropy_analysis.fisher_kernel."
    vectors = plan(f"{kernel}compute_full=false")
    assert vectors.kernel.strategy == "directions" and "no row" in "".join(vectors.lines())
    factored = plan(f"{kernel}strategy=factored")
    assert factored.kernel.strategy == "factored" and factored.kernel.memory < 200 * row / 2
    assert "of their factors" in "".join(factored.lines())


def test_a_cut_model_has_its_part_of_weights_and_rows_in_each_device() -> None:
    model = adapted("meta", 256, 4)
    whole, part = count_passes(model, 16, 16), count_passes(model, 16, 16, processes=4)
    assert part.row_bytes * 4 == pytest.approx(whole.row_bytes, rel=0.02)
    assert part.weight_bytes * 4 == pytest.approx(whole.weight_bytes, rel=0.02)
    assert part.forward == whole.forward and part.graph_bytes == whole.graph_bytes, (
        "every process passes every sequence"
    )
    # of a backward pass 2 T r (in + out) operations form a row of two factors: a quarter of them in each of four
    formed = 2 * 31 * whole.parameters
    assert whole.backward - part.backward == pytest.approx(0.75 * formed, rel=0.05)

    def plan(devices: int, *more: str):
        sizes = ("entropy_analysis.eval_batch_size=64", "entropy_analysis.train_batch_size=512")
        cut = ("checkpoint.sharding=fsdp2", "checkpoint.device=auto")
        return plan_model(model, whole_config(*sizes, *cut, *more), devices, 1e9, 16, 16)

    two, four = plan(2), plan(4)
    assert two.workers == four.workers == 1 and two.gathered == four.gathered is not None
    assert four.seconds["products of rows"] == pytest.approx(two.seconds["products of rows"] / 2, rel=0.05)
    # (W - 1) / W of the weights travel: two passes of a training row, one and four of all that stream past them
    sequences = (2 * 512 + 5 * (64 + 512)) / (2048 // 32)
    assert four.seconds["gathering weights"] == pytest.approx(sequences * 0.75 * whole.weight_bytes / 1e9, rel=0.02)
    assert "cut over 4 devices" in "\n".join(four.lines())
    with pytest.raises(UserError, match="of others' weights at a time"):
        plan(4, "entropy_analysis.fisher_kernel.memory_budget=1MiB")


def test_the_command_prints_it_for_a_checkpoint(tiny_run: Path) -> None:
    sizes = ["entropy_analysis.eval_batch_size=10000", "entropy_analysis.train_batch_size=100000"]
    plain = ["analyze", str(tiny_run), *sizes, "--dry-run", "--devices", "8"]
    said = CliRunner().invoke(app, plain)
    assert said.exit_code == 0 and "8 devices" in said.stdout and "limited by" in said.stdout
    assert "sequences of 264 tokens" in said.stdout, "256 of the prompt, the run's 8"
    found = json.loads(CliRunner().invoke(app, [*plain, "--bandwidth", "1e9", "--json"]).stdout)
    assert found["devices"] == 8 and found["limit"] in found["seconds"] and found["costs"]["forward"] > 0
    refused = CliRunner().invoke(app, ["analyze", str(tiny_run), "--devices", "8"])
    assert refused.exit_code != 0 and "--dry-run" in str(refused.exception)
