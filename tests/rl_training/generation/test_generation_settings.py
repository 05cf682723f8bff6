"""The allow-list of the generator's settings, held against what transformers makes of each."""

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, LogitsProcessorList

from rl_training.generation.settings import PARAMETERS, departures, final_settings, plain, token_ids
from tests.rl_training.sampling_setting import tiny_model, vocabulary

PLAIN = {
    "do_sample": True, "temperature": 0.7, "max_new_tokens": 4, "eos_token_id": [1], "pad_token_id": 0, "top_k": 0, "top_p": 1.0,
}  # fmt: skip
# Settings that alter what is drawn, at values where they do; the names that are found must be theirs.
ALTERING = {
    "top_k": 5, "top_p": 0.9, "min_p": 0.05, "top_h": 0.4, "typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4,
    "repetition_penalty": 1.2, "encoder_repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]], "sequence_bias": [[[5], 2.0]], "suppress_tokens": [5], "begin_suppress_tokens": [5],
    "forced_bos_token_id": 4, "forced_eos_token_id": 1, "guidance_scale": 1.5, "exponential_decay_length_penalty": (2, 1.5),
    "min_length": 3, "min_new_tokens": 2, "remove_invalid_values": True, "watermarking_config": {"bias": 2.0},
}  # fmt: skip
# Settings that alter how sequences are chosen or ended, which no logits processor shows.
CHOOSING = {
    "do_sample": False, "num_beams": 2, "num_return_sequences": 2, "max_time": 1.0, "stop_strings": ["a"], "use_mtp": True,
    "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1, "dola_layers": "high", "penalty_alpha": 0.6, "token_healing": True,
    "cache_implementation": "quantized", "constraints": [1], "force_words_ids": [[5]], "speculation_type": "dflash",
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2():
    config = GPT2Config(
        vocab_size=vocabulary(), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return tiny_model(config, scale=3.0)


def processors(model, settings):
    """What transformers would put between the logits and the draw."""
    config, _ = model._prepare_generation_config(GenerationConfig(**settings))
    model._prepare_special_tokens(config, True, device=torch.device("cpu"))
    config.max_length = 8
    ids = torch.tensor([[3, 4, 5, 6]])
    found = model._get_logits_processor(
        config, 4, encoder_input_ids=ids, logits_processor=LogitsProcessorList(), device="cpu", model_kwargs={}
    )
    return [type(p).__name__ for p in found]


def test_every_setting_of_this_release_has_its_place():
    """A setting in no table departs wherever it has a value: those of this release must all be known."""
    unknown = [
        name
        for name in vars(GenerationConfig())
        if not name.startswith("_") and "not known" in " ".join(d.effect for d in departures({name: "some value"}))
    ]
    assert not unknown, f"{unknown}: new in transformers; look up what they do to the draw, and put them in a table"


def test_plain_sampling_does_not_depart_and_has_no_processor_but_the_temperature(gpt2):
    assert departures(final_settings(gpt2, GenerationConfig(**PLAIN)), vocabulary()) == []
    assert processors(gpt2, PLAIN) == ["TemperatureLogitsWarper"]


@pytest.mark.parametrize("name", ALTERING)
def test_what_alters_the_logits_is_found_by_name(gpt2, name):
    settings = {**PLAIN, name: ALTERING[name]}
    assert len(processors(gpt2, settings)) > 1, "this value alters nothing, so the case shows nothing"
    found = departures(final_settings(gpt2, GenerationConfig(**settings)), vocabulary())
    assert [d.name for d in found] == [name]
    assert name in found[0].sentence() and "set " in found[0].sentence()


@pytest.mark.parametrize("name", CHOOSING)
def test_what_chooses_or_ends_sequences_is_found_by_name(name):
    assert [d.name for d in departures({**PLAIN, name: CHOOSING[name]})] == [name]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1000}, {"min_p": 0.0}, {"use_cache": False}, {"cache_implementation": "static"}, {"output_scores": True},
        {"renormalize_logits": True}, {"no_repeat_ngram_size": 0}, {"max_length": 7}, {"bad_words_ids": []}, {"num_beams": 1},
        {"length_penalty": 2.0}, {"guidance_scale": 1}, {"min_new_tokens": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_alters_nothing_is_let_through(settings):
    assert departures({**PLAIN, **settings}, vocabulary()) == []


def test_a_setting_of_a_release_to_come_is_not_taken_on_trust():
    assert [d.name for d in departures({**PLAIN, "quantum_cutoff": 0.1})] == ["quantum_cutoff"]
    assert departures({**PLAIN, "quantum_cutoff": None}) == []


def test_the_models_own_settings_and_transformers_defaults_count_where_the_run_leaves_them_open(gpt2):
    own = gpt2.generation_config
    try:
        gpt2.generation_config = GenerationConfig(typical_p=0.8, chat_format="raw", eos_token_id=[1, 5])
        given = {name: value for name, value in PLAIN.items() if name not in ("top_k", "eos_token_id")}
        settings = final_settings(gpt2, GenerationConfig(**given))
        assert {d.name for d in departures(settings)} == {"typical_p", "chat_format", "top_k"}, (
            "top_k=50 is transformers' default"
        )
        assert settings["top_k"] == 50 and token_ids(settings["eos_token_id"]) == (1, 5)
        assert gpt2.generation_config.top_k is None, "the model's settings were written to"
    finally:
        gpt2.generation_config = own


def test_settings_are_plain_data():
    config = GenerationConfig(watermarking_config={"bias": 1.0}, sequence_bias=[[[5], 2.0]])
    values = {name: plain(value) for name, value in vars(config).items()}
    assert values["watermarking_config"]["bias"] == 1.0
    assert plain({1: {2}, "t": torch.tensor(3.0).dtype}) == {"1": [2], "t": "torch.float32"}
    assert token_ids(torch.tensor([5, 1])) == (1, 5) and token_ids(7) == (7,) and token_ids(None) == ()
    assert {"temperature", "eos_token_id", "max_new_tokens"} == PARAMETERS
