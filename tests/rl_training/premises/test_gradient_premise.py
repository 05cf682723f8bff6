"""The check that the trainer's gradient is what its sequences' weights say: what it finds, what it names, what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOConfig, DrGRPOTrainer
from rl_training.config import EntropyProbeConfig, LoraConfig
from rl_training.errors import UserError
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import add_lora, load_model_and_tokenizer
from rl_training.premises.gradient_premise import GradientPremise
from rl_training.run.sidecar import read_sidecar
from tests.rl_training.integrations.test_trl_integration import make_trainer, weights_of
from tests.tiny_policy import character_tokenizer, even_start_reward


class Settle(TrainerCallback):
    """Settles the check, and keeps the trainer's own gradient of the first step, before clipping where there is none."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.premise = GradientPremise.of(trainer)
        self.gradients: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.troubles: list[str | None] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            self.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.premise.settle()
        self.troubles.append(self.premise.trouble_of_weights())


def settled(trainer: GRPOTrainer) -> Settle:
    callback = Settle(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.premise.check is not None
    return callback


def model_of(kind: str) -> nn.Module:
    size = {"vocab_size": len(character_tokenizer()), "bos_token_id": 1, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **none, **size))
        else:
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            model = MixtralForCausalLM(MixtralConfig(**shape, **heads, **experts, **size))
        for p in model.parameters():
            if p.dim() > 1:
                p.data.mul_(5.0)
    return model


def of_model(model: nn.Module, folder: Path, trainer: type = GRPOTrainer, uneven: bool = True, **settings: Any) -> Any:
    """A trainer of a model; prompts of unequal length unless told otherwise."""
    config = DrGRPOConfig if issubclass(trainer, DrGRPOTrainer) else GRPOConfig
    arguments = config(
        **{
            "output_dir": str(folder), "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 16,
            "num_generations": 4, "max_completion_length": 6, "gradient_checkpointing": False, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, **settings,
        }
    )  # fmt: skip
    rows = [
        {"prompt": "7" * (a if uneven else 3) + f"+{b}=", "prompt_index": 4 * a + b}
        for a in range(1, 7)
        for b in range(4)
    ]
    return trainer(
        model,
        even_start_reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(),
    )


def lora_llama(tiny_policy: Path) -> nn.Module:
    return add_lora(load_model_and_tokenizer(str(tiny_policy), device="cpu")[0], LoraConfig(r=4))


# ---------------------------------------------------------------------- what holds
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "lora": True, "temperature": 0.7},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"loss_type": "vespo", "mask_truncated_completions": True, "max_completion_length": 20},
    ],
    ids=lambda s: "-".join(s),
)
def test_the_premise_holds_to_rounding_for_losses_of_log_probabilities(tiny_policy, tmp_path, settings):
    check = settled(make_trainer(tiny_policy, tmp_path, **settings)).premise.check
    assert check.held and check.relative_error < 1e-5 and check.logprob_difference < 1e-5, check


def test_it_is_checked_once_and_training_is_what_it_would_be_without(tiny_policy, tmp_path, monkeypatch):
    from rl_training.premises import gradient_premise

    calls = []
    original = gradient_premise._rebuild
    monkeypatch.setattr(gradient_premise, "_rebuild", lambda *a: calls.append(1) or original(*a))
    trainer = make_trainer(tiny_policy, tmp_path / "with", learning_rate=1e-3, gradient_accumulation_steps=2)
    settled(trainer)
    assert calls == [1]
    alone = make_trainer(tiny_policy, tmp_path / "without", learning_rate=1e-3, gradient_accumulation_steps=2)
    alone.train()
    checked = weights_of(trainer)
    assert all(torch.equal(checked[name], w) for name, w in weights_of(alone).items())


# ---------------------------------------------------------------------- what does not, by its name
class Penalty(GRPOTrainer):
    """A user's own loss: an L2 penalty beside it."""

    size = 0.0

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + self.size * sum(p.square().sum() for p in model.parameters() if p.requires_grad) / 2


def test_what_is_left_over_is_the_second_terms_share_of_the_gradient(tiny_policy, tmp_path):
    trainer = of_model(lora_llama(tiny_policy), tmp_path, Penalty, max_steps=1, max_grad_norm=0.0)
    trainer.size = 0.05
    seen = settled(trainer)
    size = sum(float(g.double().square().sum()) for g in seen.gradients.values()) ** 0.5
    theta = sum(float(seen.parameters[n].double().square().sum()) for n in seen.gradients) ** 0.5
    check = seen.premise.check
    assert check.relative_error == pytest.approx(0.05 * theta / size, rel=1e-3)
    assert not check.held and "compute_loss adds a term of its own" in check.trouble
    assert check.logprob_difference < 1e-5, "the forward pass is the policy's"


@pytest.mark.parametrize("kind", ["tensor", "accumulated"])
def test_a_gradient_hook_is_named_and_stays(tiny_policy, tmp_path, kind):
    model = lora_llama(tiny_policy)
    name, p = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    if kind == "tensor":
        p.register_hook(lambda gradient: 3 * gradient)
    else:

        def triple(p: torch.Tensor) -> None:
            p.grad.mul_(3)

        p.register_post_accumulate_grad_hook(triple)
    check = settled(of_model(model, tmp_path, max_steps=1)).premise.check
    p.grad = None
    (p.sum()).backward()
    assert bool((p.grad == 3).all()), "the hook is gone"
    assert not check.held and "gradient hook" in check.trouble and name in check.trouble


@pytest.mark.parametrize("setting", [{}, {"router_aux_loss_coef": 1e-5}, {"router_aux_loss_coef": 0.1}])
def test_the_routers_auxiliary_loss_is_named_however_small_it_is(tmp_path, setting):
    seen = settled(of_model(model_of("moe"), tmp_path, max_steps=1, **setting))
    assert "router's auxiliary loss (router_aux_loss_coef=" in seen.troubles[0]
    assert settled(of_model(model_of("moe"), tmp_path, max_steps=1, router_aux_loss_coef=0.0)).troubles == [None]


def test_positions_counted_through_the_padding_are_named(tmp_path):
    check = settled(of_model(model_of("gpt2"), tmp_path / "uneven", max_steps=1)).premise.check
    assert not check.held and check.logprob_difference > 1e-2
    assert "counts positions through the padding" in check.trouble
    even = settled(of_model(model_of("gpt2"), tmp_path / "even", uneven=False, max_steps=1)).premise.check
    assert even.held and even.relative_error < 1e-5


def noisy(model: nn.Module, kind: str) -> nn.Module:
    if kind == "router_jitter_noise":
        return MixtralForCausalLM(type(model.config)(**{**model.config.to_dict(), "router_jitter_noise": 0.1}))
    if kind == "dropout":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    return model


@pytest.mark.parametrize("kind", ["neftune", "router_jitter_noise", "dropout"])
def test_noise_of_the_training_mode_is_named(tmp_path, kind):
    settings = {"neftune_noise_alpha": 5.0} if kind == "neftune" else {}
    model = noisy(model_of("gpt2" if kind == "dropout" else "moe"), kind)
    check = settled(
        of_model(model, tmp_path, max_steps=1, uneven=False, router_aux_loss_coef=0.0, **settings)
    ).premise.check
    assert not check.held and "random numbers in training mode" in check.trouble, check


def test_dropout_on_an_adapter_that_starts_at_zero_is_named(tiny_policy, tmp_path):
    """Log-probabilities are those without dropout, for B = 0; the gradient is not."""
    model = load_model_and_tokenizer(str(tiny_policy), device="cpu")[0]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3))
    check = settled(of_model(model, tmp_path, max_steps=1, uneven=False)).premise.check
    assert not check.held and check.logprob_difference < check.logprob_tolerance
    assert "random numbers in training mode (dropout (p=0.3" in check.trouble, check.trouble


def test_a_second_pass_that_fails_stops_no_training(tiny_policy, tmp_path):
    """Prompt tuning adds positions, so that no pass of ours can be made: the check and the probe say so and step aside."""
    model = load_model_and_tokenizer(str(tiny_policy), device="cpu")[0]
    model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer = of_model(model, tmp_path)
    attach_entropy_probe(trainer, console=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == 2
    texts = [str(w.message) for w in said if "entropy probe" in str(w.message)]
    assert any("was not checked" in t and "inserts or drops positions" in t for t in texts), texts
    assert any("failed and is off" in t and "inserts or drops positions" in t for t in texts), texts


def test_an_entropy_bonus_that_sets_in_later_is_named_from_then_on(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=10.0)
    troubles = settled(trainer).troubles
    assert troubles[0] is None and all("entropy bonus" in t for t in troubles[1:])


def test_a_loss_that_is_computed_in_another_way_is_not_taken_for_checked(tiny_policy, tmp_path):
    class Other(GRPOTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            return model(input_ids=ids).logits.square().mean()

    check = settled(of_model(lora_llama(tiny_policy), tmp_path, Other, max_steps=1)).premise.check
    assert (
        not check.made and not check.held and "not computed from the trainer's own log-probabilities" in check.trouble
    )


def test_completions_that_were_masked_out_have_no_weight_and_no_share_and_are_watched_all_the_same(
    tiny_policy, tmp_path
):
    trainer = make_trainer(
        tiny_policy, tmp_path, mask_truncated_completions=True, max_completion_length=24, max_steps=1
    )
    cut: list[bool] = []
    original = trainer.compute_loss

    def noting(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        cut.extend((~inputs["completion_mask"].bool().any(1)).tolist())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = noting
    config = EntropyProbeConfig(preset="accurate", mode="attribution", on_error="raise", eval_sequences=16)
    callback = attach_entropy_probe(trainer, config, console=False)
    trainer.train()
    (change,) = callback.history
    masked = torch.tensor(cut)
    assert 0 < int(masked.sum()) < 16, "nothing to tell apart"
    assert bool((change.shares[masked] == 0).all()) and bool((change.shares[~masked] != 0).any())
    assert change.sequences == 16, "the policy's long completions belong to its entropy"


# ---------------------------------------------------------------------- who does what about it
@pytest.mark.parametrize(
    "asked", [{}, {"mode": "attribution"}, {"fused": True}], ids=["simple", "attribution", "fused"]
)
def test_the_probe_warns_once_and_predicts_on_but_shares_are_refused(tiny_policy, tmp_path, asked):
    trainer = of_model(lora_llama(tiny_policy), tmp_path, Penalty, max_steps=3, learning_rate=1e-5)
    trainer.size = 0.05
    config = EntropyProbeConfig(**{"mode": "simple", "preset": "accurate", "on_error": "raise", **asked})
    callback = attach_entropy_probe(trainer, config, console=False)
    if asked:
        with pytest.raises(ValueError, match="compute_loss adds a term of its own.*(mode=simple|fused=false)"):
            trainer.train()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "compute_loss adds a term" in str(w.message)]
    assert len(said) == 1 and "stay right" in said[0]
    assert len(callback.history) == 3
    for change in callback.history:
        assert change.same_tokens == pytest.approx(change.measured.change, rel=0.1, abs=5e-7)


class Reweighted(DrGRPOTrainer):
    """Gives sequences another weight than is recorded."""

    factor = 1.0

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.factor * super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("factor", [1.0, 1.01, -1.0])
def test_the_trainer_refuses_a_loss_with_other_weights_than_are_recorded(tiny_policy, tmp_path, factor):
    trainer = of_model(lora_llama(tiny_policy), tmp_path, Reweighted)
    trainer.factor = factor
    before = weights_of(trainer)
    if factor == 1.0:
        trainer.train()
        assert trainer._guard.premise.check.held
        return
    with pytest.raises(UserError, match="recorded weights say: the loss gives a token a weight that differs"):
        trainer.train()
    assert all(torch.equal(before[name], w) for name, w in weights_of(trainer).items()), "before the first step"


def test_the_trainer_passes_positions_so_that_the_premise_holds(tmp_path):
    trainer = of_model(model_of("gpt2"), tmp_path, DrGRPOTrainer)
    trainer.train()
    assert trainer._guard.premise.check.held


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"router_aux_loss_coef": 0.001}, "router_aux_loss_coef"),
        ({"on_failed_premise": "ignore"}, "choose 'raise' or 'warn'"),
    ],
)
def test_settings_that_add_a_term_are_refused_at_once(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        of_model(model_of("moe"), tmp_path, DrGRPOTrainer, **settings)


def test_a_mixture_of_experts_trains_without_its_auxiliary_loss(tmp_path):
    trainer = of_model(model_of("moe"), tmp_path, DrGRPOTrainer)
    trainer.train()
    assert trainer._guard.premise.check.held and not trainer.aux_loss_enabled


def test_warn_trains_on_and_says_so_once(tiny_policy, tmp_path):
    trainer = of_model(
        lora_llama(tiny_policy),
        tmp_path,
        Reweighted,
        on_failed_premise="warn",
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.factor = 2.0
    with pytest.warns(RuntimeWarning, match="differs") as caught:
        trainer.train()
    assert sum("recorded weights" in str(w.message) for w in caught) == 1 and trainer.state.global_step == 3
    recorded = read_sidecar(tmp_path / "checkpoint-3").gradient_premise
    assert recorded.made and recorded.step == 1 and "differs" in recorded.trouble, (
        "an analysis would weigh by other numbers"
    )
