"""attach_entropy_probe on TRL's own trainer: every loss, accumulation, reuse, full and LoRA training, mixed precision."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rl_training.config import EntropyProbeConfig, LoraConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models import add_lora, load_model_and_tokenizer
from tests.tiny_policy import even_start_reward

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


def train(tiny_policy, folder, probe=True, lora=False, rows=None, **settings):
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    model = add_lora(model, LoraConfig(r=4)) if lora else model.requires_grad_(True)
    arguments = GRPOConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-5,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 6,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **settings,
        }
    )
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)])
    trainer = GRPOTrainer(model, even_start_reward, args=arguments, train_dataset=prompts, processing_class=tokenizer)
    if probe:
        attach_entropy_probe(trainer, EntropyProbeConfig(eval_sequences=24, on_error="raise", estimator="split"), rows)
    trainer.train()
    return trainer


def probed(trainer):
    prefix = "entropy_probe/"
    entries = [
        {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
        for entry in trainer.state.log_history
        if f"{prefix}predicted" in entry
    ]
    assert len(entries) == 3
    return entries


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_predicted(tiny_policy, tmp_path, loss_type):
    """The split estimator is the measurement's own derivative: what parts them is curvature, small at this step."""
    extra = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    for entry in probed(train(tiny_policy, tmp_path, loss_type=loss_type, **extra)):
        assert entry["predicted"] != 0
        error = max(0.1 * abs(entry["measured"]), 0.05 * entry["measured_se"], 5e-7)
        assert abs(entry["predicted"] - entry["measured"]) < error, (loss_type, entry)
        assert entry["batch"] + entry["momentum"] + entry["decay"] == pytest.approx(
            entry["predicted"], rel=2e-2, abs=5e-8
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"num_iterations": 2},
        {"beta": 0.05},
        {"lora": True},
        {"gradient_checkpointing": True},
        {"weight_decay": 0.1},
    ],
    ids=lambda s: "-".join(s),
)
def test_any_setting_is_predicted(tiny_policy, tmp_path, settings):
    for entry in probed(train(tiny_policy, tmp_path, **settings)):
        error = max(0.1 * abs(entry["measured"]), 0.05 * entry["measured_se"], 5e-7)
        assert abs(entry["predicted"] - entry["measured"]) < error, entry


def test_running_totals_are_sums_and_correlation_of_what_was_logged(tiny_policy, tmp_path):
    entries = probed(train(tiny_policy, tmp_path))
    for kind in ("predicted", "measured"):
        sums = torch.tensor([entry[kind] for entry in entries], dtype=torch.float64).cumsum(0).tolist()
        assert [entry[f"cumulative_{kind}"] for entry in entries] == pytest.approx(sums)
    pairs = torch.tensor([[e["predicted"], e["measured"]] for e in entries], dtype=torch.float64).T
    assert "correlation" not in entries[1]
    assert entries[2]["correlation"] == pytest.approx(float(torch.corrcoef(pairs)[0, 1]))


def test_training_is_bit_identical_with_and_without(tiny_policy, tmp_path):
    weights = {}
    for probe in (True, False):
        trainer = train(tiny_policy, tmp_path / str(probe), probe=probe)
        weights[probe] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(torch.equal(weights[True][name], w) for name, w in weights[False].items())


def test_under_mixed_precision_the_probe_itself_runs_in_full(tiny_policy, tmp_path):
    entries = probed(train(tiny_policy, tmp_path, bf16=True))
    for entry in entries:
        error = max(0.1 * abs(entry["measured"]), 0.05 * entry["measured_se"], 5e-7)
        assert abs(entry["predicted"] - entry["measured"]) < error, "log-ratios are quantised"


def test_rows_of_ones_own_and_none_at_all(tiny_policy, tmp_path):
    rows = [{"prompt": f"{i}*{i}="} for i in range(4)]
    assert probed(train(tiny_policy, tmp_path, rows=rows))[0]["ess"] <= 24.001
    with pytest.raises(UserError, match="no prompts"):
        train(tiny_policy, tmp_path / "none", rows=[])


def test_the_newcomers_script_runs(tiny_policy, tmp_path):
    script = Path("examples/grpo_with_probe.py")
    spec = importlib.util.spec_from_file_location("grpo_with_probe", script)
    assert spec is not None
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'examples'); import grpo_with_probe as g; "
         f"g.main({str(tiny_policy)!r}, 2, {str(tmp_path)!r})"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": predicted") == 2
    assert list(tmp_path.rglob("events.out.tfevents.*"))
