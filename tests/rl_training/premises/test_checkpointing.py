"""Gradient checkpointing belongs to the training's own passes: those of checks and probe leave no layer and no hook changed."""

import copy
import warnings

import peft
import pytest
import torch

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from tests.rl_training.premises.test_sampling_words import llama
from tests.rl_training.sampling_setting import make_trainer

KINDS = {
    "full": None,
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    # peft leaves hooks on checkpointed layers from every pass to the next backward pass
    "aLoRA": peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"
    ),
}


# Our trainer refuses an adapter that a completion itself can switch on.
CASES = [pytest.param(kind, ours, id=f"{kind}-{'ours' if ours else 'TRL'}") for kind in KINDS for ours in (False, True)]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "ours"), [case for case in CASES if case.id != "aLoRA-ours"])
def test_a_checkpointed_run_is_the_same_with_the_probe_and_without(tmp_path, kind, ours):
    model = llama()
    if (config := KINDS[kind]) is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = peft.get_peft_model(model, config)
    found = []
    for watched in (False, True):
        more = {"kind": DrGRPOTrainer} if ours else {}
        trainer = make_trainer(
            copy.deepcopy(model), tmp_path, **more, max_steps=2, per_device_train_batch_size=8,
            gradient_accumulation_steps=2, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if watched:
                config = EntropyProbeConfig(on_error="raise", mode="simple", preset="accurate")
                callback = attach_entropy_probe(trainer, config, console=False)
            trainer.train()
        assert not [w for w in caught if "could not be checked" in str(w.message) or "not checked" in str(w.message)]
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules())
        found.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert len(callback.history) == 2 and all(c.total.value != 0 for c in callback.history)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
