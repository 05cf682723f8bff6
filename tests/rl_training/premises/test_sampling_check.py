"""Samplers, noise and prompts that are not the recorded ones: refused by the trainer, warned of by the probe, by name."""

import warnings

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, TrainerCallback
from trl import GRPOTrainer

from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.generation.description import describe_sampling
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import load_model_and_tokenizer
from rl_training.premises.sampling_check import SamplingGuard, SamplingWatcher
from tests.rl_training.sampling_setting import make_trainer, tiny_model, vocabulary

# Plain GRPO's settings, and the name that must be said.
SAMPLERS = [
    ({"top_k": 5}, "top_k=5"),
    ({"top_k": None}, "top_k=50"),
    ({"top_p": 0.8}, "top_p=0.8"),
    ({"min_p": 0.1}, "min_p=0.1"),
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
    ({"generation_kwargs": {"temperature": 0.5}}, "temperature=0.5"),
    ({"generation_kwargs": {"do_sample": False}}, "do_sample=False"),
    ({"generation_kwargs": {"min_new_tokens": 2}}, "min_new_tokens=2"),
    ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size=2"),
    ({"generation_kwargs": {"typical_p": 0.9}}, "typical_p=0.9"),
    ({"generation_kwargs": {"eos_token_id": [1, 9]}}, "eos_token_id=[1, 9]"),
    ({"generation_kwargs": {"max_new_tokens": 3}}, "max_new_tokens=3"),
]


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = tiny_model(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model.requires_grad_(True)


def warnings_of(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(w.message) for w in caught if str(w.message).startswith("entropy probe:")]


def attached(trainer, **probe):
    config = EntropyProbeConfig(**{"on_error": "raise", "mode": "simple", "preset": "accurate", **probe})
    return warnings_of(lambda: attach_entropy_probe(trainer, config, console=False))


# ---------------------------------------------------------------------- the sampler
@pytest.mark.parametrize(("settings", "name"), SAMPLERS, ids=lambda v: v if isinstance(v, str) else "")
def test_another_sampler_is_warned_of_and_refused_by_name(model, tmp_path, settings, name):
    trainer = make_trainer(model, tmp_path, **settings)
    _, told = attached(trainer)
    assert len(told) == 1 and name in told[0], told
    settings = {"top_k": 0, **settings}
    if settings["top_k"] is None:  # the class leaves no choice there
        return
    with pytest.raises(UserError, match=name.split("=")[0]):
        make_trainer(model, tmp_path, DrGRPOTrainer, **settings)


def test_the_plain_sampler_is_not_warned_of(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    _, told = attached(trainer)
    _, told_in_training = warnings_of(trainer.train)
    assert told + told_in_training == []


class Anneals(TrainerCallback):
    """A schedule that changes how completions are drawn, after a step."""

    def __init__(self, change):
        self.trainer, self.change = None, change

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.change(self.trainer)


CHANGES = {
    "temperature": lambda trainer: setattr(trainer, "temperature", 0.7),
    "generation_config.temperature": lambda trainer: setattr(trainer.generation_config, "temperature", 0.7),
    "generation_config.top_k": lambda trainer: setattr(trainer.generation_config, "top_k", 5),
    "args.max_completion_length": lambda trainer: setattr(trainer.args, "max_completion_length", 3),
    "model.generation_config.min_p": lambda trainer: setattr(trainer.model.generation_config, "min_p", 0.1),
}


@pytest.mark.parametrize("mode", ["watch", "simple"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_while_training_ends_the_probe(model, tmp_path, name, mode):
    trainer, schedule = make_trainer(model, tmp_path), Anneals(CHANGES[name])
    schedule.trainer = trainer
    trainer.add_callback(schedule)
    config = EntropyProbeConfig(mode=mode, preset="light")
    callback = attach_entropy_probe(trainer, config, console=False)
    with pytest.warns(RuntimeWarning, match=f"off from here on.* {name} changed from .* before step 2"):
        trainer.train()
    assert len(callback.history) <= 1


def test_a_setting_that_changes_while_training_ends_a_run_of_ours(model, tmp_path):
    trainer, schedule = make_trainer(model, tmp_path, DrGRPOTrainer), Anneals(CHANGES["temperature"])
    schedule.trainer = trainer
    trainer.add_callback(schedule)
    with pytest.raises(UserError, match="temperature changed from 1.0 to 0.7 before step 2"):
        trainer.train()


@pytest.mark.parametrize("own", [{"repetition_penalty": 1.3}, {"typical_p": 0.7}, {"suppress_tokens": [4]}], ids=str)
def test_settings_of_the_model_count_where_the_trainer_leaves_them_open(model, tmp_path, own):
    """TRL sets a repetition penalty itself, and none of the others."""
    model.generation_config = GenerationConfig(eos_token_id=1, **own)
    _, told = attached(make_trainer(model, tmp_path))
    name = next(iter(own))
    assert [name in line for line in told] == ([] if name == "repetition_penalty" else [True])
    if name != "repetition_penalty":
        with pytest.raises(UserError, match=name):
            make_trainer(model, tmp_path, DrGRPOTrainer)


def test_a_setting_that_is_changed_between_construction_and_training_is_found(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    _, told = attached(trainer)
    trainer.generation_config.top_p = 0.5
    _, later = warnings_of(trainer.train)
    assert told == [] and [("top_p=0.5" in line) for line in later if "surprisal" not in line] == [True]
    refusing = make_trainer(model, tmp_path, DrGRPOTrainer)
    refusing.generation_config.top_p = 0.5
    with pytest.raises(UserError, match=r"top_p=0\.5"):
        refusing.train()


def test_a_temperature_that_is_changed_between_attaching_and_training_ends_the_probe(model, tmp_path):
    """It went on at the temperature that it was attached at."""
    trainer = make_trainer(model, tmp_path)
    attached(trainer, on_error="warn")
    trainer.generation_config.temperature = 0.5
    with pytest.warns(RuntimeWarning, match=r"off from here on.*generation_config.temperature changed from 1.0 to 0.5"):
        trainer.train()


def test_fresh_completions_take_nothing_from_the_models_own_settings(model):
    """Their lengths alone would say it: with a forced end every completion would be one token long."""
    from rl_training.sampling import SamplingConfig, generate_completions

    model.generation_config = GenerationConfig(min_new_tokens=6, suppress_tokens=[5], repetition_penalty=9.0, top_k=1)
    sampling_config = SamplingConfig(1.0, 6, (1,), 0)
    ours = generate_completions(model, [[4, 5, 6]] * 200, sampling_config, seed=0)
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    assert ours == generate_completions(model, [[4, 5, 6]] * 200, sampling_config, seed=0)
    assert kept.repetition_penalty == 9.0 and len({c[0] for c in ours}) > 10


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_settings_that_an_adapters_wrapper_was_given_are_the_models_own(model, tmp_path, task):
    """peft puts them in the place of the inner model's whenever it generates, if it was told of a language model: found at
    attach, and taken away for the probe.
    """
    from rl_training.sampling import SamplingConfig, generate_completions

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    adapted.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, no_repeat_ngram_size=2)
    trainer = make_trainer(adapted, tmp_path)
    _, told = attached(trainer)
    if task is None:
        assert not told and not describe_sampling(trainer).generation["no_repeat_ngram_size"]
    else:
        assert len(told) == 1 and "no_repeat_ngram_size=2" in told[0], told
        with pytest.raises(UserError, match="no_repeat_ngram_size=2"):
            make_trainer(adapted, tmp_path, DrGRPOTrainer)
    given = (adapted, [[4, 5, 6]] * 64, SamplingConfig(1.0, 6, (1,), 0))
    adapted.generation_config = own = GenerationConfig(min_new_tokens=6, suppress_tokens=[5], repetition_penalty=9.0)
    ours = generate_completions(*given, seed=0)
    assert adapted.generation_config is own and not model.generation_config.no_repeat_ngram_size
    adapted.generation_config = GenerationConfig()
    assert ours == generate_completions(*given, seed=0), "the wrapper's settings altered what was drawn"


def test_the_sampling_is_that_of_the_generators_final_configuration(model, tmp_path):
    model.generation_config = GenerationConfig(eos_token_id=[1, 7])
    trainer = make_trainer(model, tmp_path, temperature=0.7, generation_kwargs={"max_new_tokens": 4})
    description = describe_sampling(trainer)
    sampling_config = description.sampling_config()
    stops = getattr(trainer, "eos_token_ids", [1])  # releases before 1.14 stop at the tokenizer's alone
    assert (sampling_config.temperature, sampling_config.max_completion_length, sampling_config.eos_token_ids) == (
        0.7,
        4,
        tuple(sorted(stops)),
    )
    assert [d.name for d in description.departures] == ["max_new_tokens"]
    assert description.generation["temperature"] == 0.7 and "top_k" in description.generation
    assert any("softmax(logits / 0.7)" in line for line in description.describe())


@pytest.mark.parametrize("where", ["on the instance", "in the class"])
def test_a_generate_of_ones_own_is_not_known_to_draw_from_the_softmax(model, tmp_path, where):
    if where == "on the instance":
        original = model.generate
        model.generate = lambda *args, **kwargs: original(*args, **kwargs)
    else:
        model.__class__ = type("Other", (LlamaForCausalLM,), {"generate": lambda self, *a, **k: None})
    _, told = attached(make_trainer(model, tmp_path))
    assert len(told) == 1 and "model.generate" in told[0]
    with pytest.raises(UserError, match="generate"):
        make_trainer(model, tmp_path, DrGRPOTrainer)


def test_an_adapter_that_acts_by_what_is_drawn_later_is_named(model, tmp_path):
    """aLoRA: `generate` goes by the tokens of the prompt, a forward pass by the last ones of the whole sequence."""
    adapted = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    invoked = peft.get_peft_model(model, peft.LoraConfig(**adapted, alora_invocation_tokens=[9]))
    _, told = attached(make_trainer(invoked, tmp_path))
    assert len(told) == 1 and "alora_invocation_tokens=[9]" in told[0] and "scored without it" in told[0]
    with pytest.raises(UserError, match=r"alora_invocation_tokens=\[9\].*train LoRA without"):
        make_trainer(invoked, tmp_path, DrGRPOTrainer)
    plain = peft.get_peft_model(invoked.unload(), peft.LoraConfig(**adapted))
    assert attached(make_trainer(plain, tmp_path))[1] == []


def test_a_rollout_function_is_named(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    trainer.rollout_func = test_a_rollout_function_is_named
    assert [d.name for d in describe_sampling(trainer).departures] == ["rollout_func"]


@pytest.mark.parametrize(
    "setting",
    [
        {"use_transformers_continuous_batching": True},
        {"neftune_noise_alpha": 5.0},
        {"generation_kwargs": {"new_key": 1}},
    ],
    ids=str,
)
def test_arguments_are_refused_before_there_is_a_trainer(tmp_path, setting):
    from rl_training.algs.dr_grpo import DrGRPOConfig
    from tests.rl_training.sampling_setting import arguments

    with pytest.raises(UserError, match=list(setting)[-1] if "generation_kwargs" not in setting else "new_key"):
        arguments(tmp_path, DrGRPOConfig, **setting)


def test_an_argument_of_a_release_to_come_is_refused_unless_at_its_default(tmp_path, monkeypatch):
    import dataclasses

    from trl import GRPOConfig

    from rl_training.algs.trainer_arguments import refuse_arguments
    from tests.rl_training.sampling_setting import arguments

    later = dataclasses.make_dataclass("Later", [("tilt", float, 0.0)], bases=(GRPOConfig,))
    later.__module__ = "trl.later"
    refuse_arguments(arguments(tmp_path, later, top_k=0))
    with pytest.raises(UserError, match=r"tilt=0\.5"):
        refuse_arguments(arguments(tmp_path, later, top_k=0, tilt=0.5))


# ---------------------------------------------------------------------- noise of training mode
def test_noise_on_the_embeddings_is_found_when_training_begins(model, tmp_path):
    trainer = make_trainer(model, tmp_path, neftune_noise_alpha=5.0)
    attached(trainer)
    _, told = warnings_of(trainer.train)
    assert any("neftune_noise_alpha=5" in line and "standard deviation" in line for line in told), told


@pytest.mark.parametrize("kind", [GRPOTrainer, DrGRPOTrainer])
def test_what_a_sharded_model_leaves_unchecked_is_said(model, tmp_path, kind, monkeypatch):
    trainer = make_trainer(model, tmp_path, kind)
    watcher = SamplingGuard(trainer) if kind is DrGRPOTrainer else SamplingWatcher(trainer, describe_sampling(trainer))
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.warns(match="the model is sharded .* was not checked"):
        watcher.on_train_begin()


def test_noise_without_a_name_stops_the_trainer(model, tmp_path):
    """A hook that adds noise in training mode alone is in no list of names."""
    trainer = make_trainer(model, tmp_path, DrGRPOTrainer)
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + 0.05 * torch.randn_like(output) if module.training else output
    )
    with pytest.raises(UserError, match="training mode is another function"):
        trainer.train()
    handle.remove()
    trainer.train()


def test_a_routers_jitter_is_taken_away_by_the_trainer_and_warned_of_by_the_probe(tmp_path):
    config = MixtralConfig(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.1, attention_dropout=0.2,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    trainer = make_trainer(tiny_model(config, 2.0).requires_grad_(True), tmp_path)
    attached(trainer, standard_error_folds=0)
    _, told = warnings_of(trainer.train)
    assert any("jitter_noise=0.1" in line and "attention_dropout=0.2" in line for line in told), told
    model = tiny_model(config, 2.0).requires_grad_(True)
    from rl_training.generation.training_noise import train_mode_change, training_noise

    row = list(range(3, 23))
    assert train_mode_change(model, row) > 1e-2
    make_trainer(model, tmp_path, DrGRPOTrainer)
    assert training_noise(model) == [] and train_mode_change(model, row) == 0


# ---------------------------------------------------------------------- prompts
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if thinking is not defined or thinking %}?{% endif %}"
)
CHATS = [[{"role": "user", "content": f"{a}+{b}"}] for a in range(4) for b in range(4)]


def chat_tokenizer():
    from tests.tiny_policy import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def question_marks(sequences, tokenizer):
    mark = tokenizer.convert_tokens_to_ids("?")
    return {mark in ids for ids in sequences}


@pytest.mark.parametrize("thinking", [True, False])
def test_fresh_prompts_are_rendered_as_the_trainer_renders_its_own(model, tmp_path, thinking):
    tokenizer = chat_tokenizer()
    trainer = make_trainer(
        model, tmp_path, prompts=CHATS, tokenizer=tokenizer, chat_template_kwargs={"thinking": thinking}
    )
    callback, _ = attached(trainer, rollouts="fresh", eval_sequences=4)
    drawn = []
    original = callback._draw
    callback._draw = lambda rng: drawn.append(original(rng)) or drawn[-1]
    trainer.train()
    assert drawn and question_marks([s.prompt_ids for part in drawn for s in part], tokenizer) == {thinking}


def test_a_template_that_changes_after_the_probe_was_attached_is_followed(model, tmp_path):
    tokenizer = chat_tokenizer()
    trainer = make_trainer(model, tmp_path, prompts=CHATS, tokenizer=tokenizer)
    callback, _ = attached(trainer, rollouts="fresh", eval_sequences=4)
    tokenizer.chat_template = TEMPLATE.replace("?", "!")
    drawn = []
    original = callback._draw
    callback._draw = lambda rng: drawn.append(original(rng)) or drawn[-1]
    trainer.train()
    assert question_marks([s.prompt_ids for part in drawn for s in part], tokenizer) == {False}


@pytest.mark.parametrize("kind", [GRPOTrainer, DrGRPOTrainer])
def test_prompts_that_are_rendered_otherwise_are_refused(model, tmp_path, kind):
    class Prefixed(kind):
        def _tokenize_prompts(self, prompts):
            ids, *rest = super()._tokenize_prompts(prompts)
            return [[5, *row] for row in ids], *rest

    trainer = make_trainer(model, tmp_path, Prefixed, prompts=CHATS, tokenizer=chat_tokenizer())
    if kind is GRPOTrainer:
        attached(trainer, rollouts="fresh", eval_sequences=4)
    with pytest.raises(UserError, match="not what the chat template makes"):
        trainer.train()


def test_the_loaded_policy_of_train_is_plain(tiny_policy, tmp_path):
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    trainer = make_trainer(model.requires_grad_(True), tmp_path, DrGRPOTrainer, tokenizer=tokenizer)
    assert (
        trainer._sampling_guard.description.departures == ()
        and trainer._sampling_guard.description.training_noise == ()
    )
