"""The policy that was loaded is the one that was saved, or it is said that it is not, or that nobody knows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from entropy_experiments.checkpoint_loader import load_checkpoint
from rl_training.algs.dr_grpo import DrGRPOConfig, DrGRPOTrainer
from rl_training.errors import UserError
from rl_training.models.adapter_initialisation import REPEATABLE, unrepeatable_initialisation
from rl_training.models.load import load_model_and_tokenizer
from rl_training.premises.policy_witness import choose_witness, witness_differences
from rl_training.run.sidecar import read_sidecar
from rl_training.sequences import RolloutSequence
from tests.entropy_experiments.checkpoint_edits import reseal
from tests.tiny_policy import even_start_reward, save_tiny_policy

MEMO = "entropy_experiments.json"


def edited(folder: Path, **changes: Any) -> None:
    """The checkpoint's record with other values; None takes one out."""
    path = folder / MEMO
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))


def test_a_witness_is_recorded_and_found_again_to_rounding(tiny_run):
    sidecar = read_sidecar(tiny_run / "checkpoint-4")
    witness = sidecar.witness
    assert 2 <= len(witness.scores) <= 4 and len({tuple(p) for p in witness.prompt_ids}) == len(witness.scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_checkpoint(tiny_run / "checkpoint-4").model
    for found, allowed in witness_differences(model, witness, sidecar.sampling.temperature, 0, torch.float32):
        assert found < 1e-5 < allowed
    # By hand: one sequence alone, without padding.
    ids = torch.tensor([witness.prompt_ids[0] + witness.completion_ids[0]])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, :-1] / sidecar.sampling.temperature).log_softmax(-1)
    taken = logprobs.gather(1, ids[0, 1:, None])[len(witness.prompt_ids[0]) - 1 :].sum()
    assert float(taken) == pytest.approx(witness.scores[0], abs=1e-4)


def test_it_is_the_policy_after_the_last_step_not_before(tiny_run):
    """Earlier weights with the later record are another policy."""
    sidecar = read_sidecar(tiny_run / "checkpoint-4")
    model = load_checkpoint(tiny_run / "checkpoint-2").model
    assert any(found > allowed for found, allowed in witness_differences(model, sidecar.witness, 1.0, 0, torch.float32))


def another_adapter(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({n: w + 0.01 * torch.ones_like(w) if "lora_B" in n else w for n, w in weights.items()}, path)


def one_flipped_byte(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = max((n for n in weights if "lora_B" in n), key=lambda n: float(weights[n].abs().max()))
    flat = weights[name].flatten()
    flat.view(torch.int32)[int(flat.abs().argmax())] ^= 1 << 26  # a bit of the exponent: 256 times larger
    save_file(weights, path)


def another_scale(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 9}))


@pytest.mark.parametrize("damage", [another_adapter, one_flipped_byte, another_scale])
def test_another_policy_is_refused(checkpoint_copy, damage):
    damage(checkpoint_copy)
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="not the one that was saved.*nats.*checkpoint.model="):
        load_checkpoint(checkpoint_copy)


def test_another_base_model_is_refused_by_the_same_word(checkpoint_copy, tmp_path):
    other = save_tiny_policy(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="not the one that was saved"):
        load_checkpoint(checkpoint_copy, model_name=str(other))


def test_a_smaller_vocabulary_is_refused(checkpoint_copy, tmp_path):
    """Tokens of the witness that the model does not have."""
    sidecar = read_sidecar(checkpoint_copy)
    base = AutoModelForCausalLM.from_pretrained(sidecar.model_name)
    base.resize_token_embeddings(8)
    base.save_pretrained(tmp_path / "small")
    load_model_and_tokenizer(sidecar.model_name)[1].save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="checkpoint.model="):
        load_checkpoint(checkpoint_copy, model_name=str(tmp_path / "small"))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_another_precision_asked_for_is_no_other_policy(checkpoint_copy, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_checkpoint(checkpoint_copy, dtype=dtype).record.step == 4


def test_without_a_record_it_is_said_that_nothing_was_verified(checkpoint_copy):
    edited(checkpoint_copy, witness=None)
    with pytest.warns(UserWarning, match="not verified: that the policy is the one that was saved") as caught:
        load_checkpoint(checkpoint_copy)
    assert len([w for w in caught if "not verified" in str(w.message)]) == 1
    (checkpoint_copy / MEMO).unlink()
    with pytest.warns(UserWarning, match="not verified"):
        load_checkpoint(checkpoint_copy)


def test_dropout_of_a_run_without_a_record_is_said(tmp_path):
    policy, folder = save_tiny_policy(tmp_path / "policy"), tmp_path / "checkpoint-1"
    adapter_of(policy, folder, True)
    path = folder / "adapter_config.json"
    for probability in (0.05, 0.0):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": probability}))
        with pytest.warns(UserWarning, match="not verified") as caught:
            load_checkpoint(folder, require_optimizer=False)
        said = [w for w in caught if "lora_dropout=0.05" in str(w.message)]
        assert len(said) == (probability > 0)


def adapter_of(policy: Path, folder: Path, initialisation: Any) -> None:
    """A checkpoint of plain PEFT whose adapter was created so; its files beside it are a Trainer's."""
    model = AutoModelForCausalLM.from_pretrained(policy)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=initialisation, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    load_model_and_tokenizer(str(policy))[1].save_pretrained(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))


@pytest.mark.parametrize("initialisation", ["pissa_niter_4", "pissa_niter_16"])
def test_an_initialisation_that_is_random_at_load_is_refused_by_name(tmp_path, initialisation):
    policy, folder = save_tiny_policy(tmp_path / "policy"), tmp_path / "checkpoint-1"
    adapter_of(policy, folder, initialisation)
    with pytest.raises(UserError, match=f"{initialisation}.*init_lora_weights=True"):
        load_checkpoint(folder, require_optimizer=False)


@pytest.mark.parametrize("initialisation", [True, "gaussian", "pissa", "olora", "orthogonal"])
def test_repeatable_initialisations_give_the_same_policy_at_each_load(tmp_path, initialisation):
    policy, folder = save_tiny_policy(tmp_path / "policy"), tmp_path / "checkpoint-1"
    adapter_of(policy, folder, initialisation)
    ids = torch.arange(3, 40)[None]
    with pytest.warns(UserWarning, match="not verified"):
        first, second = (load_checkpoint(folder, require_optimizer=False).model(ids).logits for _ in range(2))
    base = AutoModelForCausalLM.from_pretrained(policy)(ids).logits
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    torch.testing.assert_close(first, base, rtol=0, atol=1e-2)  # untrained: the base model's policy
    assert initialisation in REPEATABLE


@pytest.mark.parametrize("name", ["pissa_niter_4", "corda", "loftq", "lora_ga", "a later release's"])
def test_what_is_not_known_to_be_repeatable_is_named(name):
    assert unrepeatable_initialisation({"init_lora_weights": name}) == name
    assert unrepeatable_initialisation({}) is None and unrepeatable_initialisation({"init_weights": True}) is None


def test_the_trainer_refuses_it_before_it_trains(tmp_path):
    model, tokenizer = load_model_and_tokenizer(str(save_tiny_policy(tmp_path / "policy")))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa_niter_4", task_type="CAUSAL_LM")
    args = DrGRPOConfig(
        str(tmp_path / "run"), use_cpu=True, num_generations=4, per_device_train_batch_size=8, report_to=[]
    )
    with pytest.raises(UserError, match="pissa_niter_4.*another policy at each load"):
        DrGRPOTrainer(
            model=get_peft_model(model, config), args=args, processing_class=tokenizer, reward_funcs=even_start_reward,
            train_dataset=Dataset.from_list([{"prompt": "1+1=", "prompt_index": 0}]),
        )  # fmt: skip


# ---------------------------------------------------------------------- the run's own finding
def test_the_gradient_premise_is_recorded(tiny_run):
    found = read_sidecar(tiny_run / "checkpoint-4").gradient_premise
    assert found.made and found.trouble is None and 0 < found.relative_error < 1e-4 < found.tolerance


@pytest.mark.parametrize(
    ("premise", "message"),
    [
        ({"step": 1, "made": True, "trouble": "the loss holds a KL term"}, "the loss holds a KL term"),
        ({"step": 1, "made": True, "trouble": "positions"}, "gradient was not the one"),
    ],
)
def test_a_run_whose_gradient_was_another_is_refused(checkpoint_copy, premise, message):
    edited(checkpoint_copy, gradient_premise=premise)
    with pytest.raises(UserError, match=message):
        load_checkpoint(checkpoint_copy)


@pytest.mark.parametrize("premise", [None, {"step": 1, "made": False, "trouble": "sharded"}])
def test_a_premise_that_was_not_checked_is_said_to_be_so(checkpoint_copy, premise):
    edited(checkpoint_copy, gradient_premise=premise)
    with pytest.warns(UserWarning, match="not verified: that the run's gradient"):
        load_checkpoint(checkpoint_copy)


def test_few_short_prompts_and_beginnings_of_completions_are_chosen():
    many = [RolloutSequence((p,) * (p + 1), tuple(range(k + 1))) for p in range(9) for k in range(3)]
    chosen = choose_witness(many)
    assert [(s.prompt_ids, len(s.completion_ids)) for s in chosen] == [((p,) * (p + 1), 3) for p in range(4)]
    assert len(choose_witness([RolloutSequence((1,) * 4000, (1,) * 300), RolloutSequence((2,) * 4001, (1,))])) == 1
    assert choose_witness([]) == []
