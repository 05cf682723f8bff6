"""Analyses of policies whose gradients hooks cannot form, end to end: every self-check holds, and one line says what it cost."""

from pathlib import Path

import peft
import pytest
import transformers
from torch import nn

from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.records.record import json_of
from entropy_experiments.run.reporter import Reporter
from rl_training.errors import UserError
from tests.entropy_experiments.made_checkpoint import make_checkpoint
from tests.entropy_experiments.small_analysis import config
from tests.tiny_policy import character_tokenizer

pytestmark = pytest.mark.long

VOCABULARY = len(character_tokenizer())
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1}


def llama(**changes) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED, tie_word_embeddings=True, **changes))


def moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**GATED, **experts, tie_word_embeddings=False))


def gpt2(positions: int = 256) -> nn.Module:
    shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=1))


def adapter(kind: type[peft.PeftConfig], **options):
    return lambda model: peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options))


POLICIES = {
    "dora": (llama, adapter(peft.LoraConfig, r=3, use_dora=True, target_modules="all-linear"), "loop"),
    "ia3": (
        llama,
        adapter(peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loop",
    ),
    "full_moe": (moe, None, "loop"),
    "full_gpt2": (gpt2, None, "hooks"),
    "full_padding_tied": (lambda: llama(pad_token_id=0), None, "hooks"),
}


class Heard(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_analysed_end_to_end(name: str, tiny_run: Path, tmp_path: Path) -> None:
    build, adapt, method = POLICIES[name]
    path = make_checkpoint(build(), adapt, tmp_path, tiny_run / "checkpoint-4")
    reporter = Heard()
    step = "entropy_analysis.fisher_kernel.preconditioning=step"
    found = run_fisher_analysis(path, config(step), folder=tmp_path / "results", reporter=reporter)
    assert not found.failed_checks and not found.failed_analyses
    rows = json_of(found.summary.gradient_rows)
    assert rows["method"] == method
    lines = [line for line in reporter.notes if "one backward pass per sequence" in line]
    assert len(lines) == (method == "loop")
    page = found.report.read_text()
    if method == "loop":
        assert "passes in place of" in lines[0] and rows["reason"] in lines[0]
        assert "one pass per sequence (loop)" in page
    else:
        assert "batched passes (hooks)" in page


def test_prompts_longer_than_the_position_table_are_one_line(tiny_run: Path, tmp_path: Path) -> None:
    path = make_checkpoint(gpt2(positions=16), None, tmp_path, tiny_run / "checkpoint-4")
    with pytest.raises(UserError, match=r"prompts of up to \d+ tokens .* table of 16 positions: shorten prompts"):
        run_fisher_analysis(path, config(), folder=tmp_path / "results")
    assert not (tmp_path / "results").exists() and not list(tmp_path.glob("*.part"))
