"""Which settings of transformers' `generate` leave completions to the plain sampling distribution,
and which do not.

    a_k ~ softmax(z_k / T),   k = 1, 2, ...,   until an end-of-sequence token is drawn or max_new_tokens are there

is what entropies, log-probabilities and gradients are computed for. Every setting of a
`GenerationConfig` has a place in the tables below: it does not change what is drawn, or does not
at certain values, or it is a parameter of the distribution itself. Whatever is in no table counts
as changing the distribution wherever it has a value: releases of transformers to come, and a
model's own entries, are not assumed to be harmless.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rl_training.models.own_settings import model_settings, model_settings_of

_TRUNCATED = (
    "completions come from a truncated distribution, but predicted and measured changes are those of the untruncated softmax "
    "and can have the opposite sign (a truncated sampler that records the tokens it kept is not supported yet)"
)
_RESHAPED = (
    "completions come from logits that the sampler has altered, but predicted and measured changes are those of the unaltered "
    "softmax and can have the opposite sign"
)
_CHOSEN = (
    "completions are not drawn from softmax(logits / temperature) but chosen, so that averages over them say nothing of the "
    "policy: predicted and measured changes are wrong, often 0"
)
_ENDED = (
    "completions end by another rule than the first end-of-sequence token or the maximum length, so that entropies and "
    "log-probabilities belong to other sequences than those of the policy"
)
_ROUNDED = "completions are drawn by a forward pass of lower precision than the one that is differentiated"
_UNKNOWN = (
    "not known to leave the sampling distribution softmax(logits / temperature) as it is; every number rests on that"
)

# Parameters of the distribution: compared with what is recorded, not with a neutral value.
PARAMETERS = frozenset({"temperature", "eos_token_id", "max_new_tokens"})

# Without effect on which tokens are drawn, whatever the value: caches and compilation, what is returned,
# special tokens that only fill or start a sequence, bookkeeping, and refinements of beam search and
# of assisted decoding, each of which is off by its own switch (num_beams, prompt_lookup_num_tokens,
# ...) below. `max_length` yields to `max_new_tokens`, which is always given.
_IDLE = frozenset(
    "use_cache cache_config max_cache_len prefill_chunk_size compile_config disable_compile continuous_batching_config "
    "low_memory return_dict_in_generate output_attentions output_hidden_states output_scores output_logits pad_token_id "
    "bos_token_id decoder_start_token_id transformers_version max_length early_stopping length_penalty num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind "
    "max_matching_ngram_size".split()
)


def _is(*neutral: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is n or (type(value) is not bool and value == n) for n in neutral)


def _empty(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and not value


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 1


def _at_most_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= 0


def _never(value: Any) -> bool:
    return False


_PLAIN_CACHES = _is(
    *("dynamic", "offloaded", "static", "offloaded_static", "sliding_window"),
    *("hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)

# Setting -> (what it does elsewhere, at which values it does nothing, how to take it away). None
# does nothing in all of them.
_NEUTRAL: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "do_sample": (_CHOSEN, _is(True), "do_sample=True"),
    "num_beams": (_CHOSEN, _is(1), "num_beams=1"),
    "num_beam_groups": (_CHOSEN, _is(1), "num_beam_groups=1"),
    "diversity_penalty": (_CHOSEN, _is(0), "diversity_penalty=0.0"),
    "num_return_sequences": (_CHOSEN, _is(1), "num_return_sequences=1"),
    "constraints": (_CHOSEN, _empty, "constraints=None"),
    "force_words_ids": (_CHOSEN, _empty, "force_words_ids=None"),
    "penalty_alpha": (_CHOSEN, _is(0), "penalty_alpha=None"),
    "dola_layers": (_CHOSEN, _never, "dola_layers=None"),
    "use_mtp": (_CHOSEN, _is(False), "use_mtp=None"),
    "is_assistant": (_CHOSEN, _is(False), "is_assistant=None"),
    "prompt_lookup_num_tokens": (_CHOSEN, _never, "prompt_lookup_num_tokens=None"),
    "assistant_early_exit": (_CHOSEN, _never, "assistant_early_exit=None"),
    "assistant_ensemble_weight": (_RESHAPED, _never, "assistant_ensemble_weight=None"),
    "speculation_type": (_CHOSEN, _never, "speculation_type=None"),
    "top_k": (_TRUNCATED, _is(0), "top_k=0"),
    "top_p": (_TRUNCATED, _at_least_one, "top_p=1.0"),
    "min_p": (_TRUNCATED, _is(0), "min_p=None"),
    "top_h": (_TRUNCATED, _never, "top_h=None"),
    "typical_p": (_TRUNCATED, _at_least_one, "typical_p=1.0"),
    "epsilon_cutoff": (_TRUNCATED, _is(0), "epsilon_cutoff=0.0"),
    "eta_cutoff": (_TRUNCATED, _is(0), "eta_cutoff=0.0"),
    "repetition_penalty": (_RESHAPED, _is(1), "repetition_penalty=1.0"),
    "encoder_repetition_penalty": (_RESHAPED, _is(1), "encoder_repetition_penalty=1.0"),
    "no_repeat_ngram_size": (_RESHAPED, _is(0), "no_repeat_ngram_size=0"),
    "encoder_no_repeat_ngram_size": (_RESHAPED, _is(0), "encoder_no_repeat_ngram_size=0"),
    "bad_words_ids": (_RESHAPED, _empty, "bad_words_ids=None"),
    "sequence_bias": (_RESHAPED, _empty, "sequence_bias=None"),
    "suppress_tokens": (_RESHAPED, _empty, "suppress_tokens=None"),
    "begin_suppress_tokens": (_RESHAPED, _empty, "begin_suppress_tokens=None"),
    "forced_bos_token_id": (_RESHAPED, _never, "forced_bos_token_id=None"),
    "forced_eos_token_id": (_RESHAPED, _never, "forced_eos_token_id=None"),
    "guidance_scale": (_RESHAPED, _is(1), "guidance_scale=None"),
    "watermarking_config": (_RESHAPED, _never, "watermarking_config=None"),
    "remove_invalid_values": (_RESHAPED, _is(False), "remove_invalid_values=False"),
    "renormalize_logits": (_RESHAPED, _is(True, False), "renormalize_logits=None"),
    "exponential_decay_length_penalty": (_RESHAPED, _never, "exponential_decay_length_penalty=None"),
    "token_healing": (_RESHAPED, _is(False), "token_healing=False"),
    "min_length": (_ENDED, _at_most_zero, "min_length=0"),
    "min_new_tokens": (_ENDED, _at_most_zero, "min_new_tokens=None"),
    "max_time": (_ENDED, _never, "max_time=None"),
    "stop_strings": (_ENDED, _empty, "stop_strings=None"),
    "cache_implementation": (_ROUNDED, _PLAIN_CACHES, "cache_implementation=None"),
}


@dataclass(frozen=True)
class Departure:
    """A setting under which completions do not follow the distribution that is differentiated.

    Attributes:
        effect: what that does to the numbers.
        remedy: what to set instead, and where.
        tolerable: DrGRPOTrainer goes on with it, with a warning.
    """

    name: str
    value: Any
    effect: str
    remedy: str
    tolerable: bool = False

    def sentence(self) -> str:
        """`top_k=5: completions come from ...; set top_k=0`."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return f"{self.name}={shown}: {self.effect}; {self.remedy}"


def departures(settings: Mapping[str, Any], vocabulary_size: int | None = None, where: str = "") -> list[Departure]:
    """Settings that take completions away from softmax(logits / T) cut at EOS or the maximum
    length, by name.

    Args:
        settings: of a GenerationConfig; keys that are missing or None have no effect.
        vocabulary_size: top_k from there on keeps every token.
        where: named in the remedies, e.g. "in generation_kwargs".
    """
    found = []
    for name, value in settings.items():
        if value is None or name.startswith("_") or name in PARAMETERS or name in _IDLE:
            continue
        if name == "top_k" and vocabulary_size is not None and isinstance(value, int) and value >= vocabulary_size:
            continue
        effect, does_nothing, remedy = _NEUTRAL.get(name, (_UNKNOWN, _never, f"leave {name} out"))
        if not does_nothing(value):
            told = f"set {remedy}" if name in _NEUTRAL else remedy
            found.append(Departure(name, value, effect, f"{told} {where}".rstrip()))
    return found


def final_settings(model: Any, own: Any) -> dict[str, Any]:
    """Every setting that `model.generate(generation_config=own)` will use, those without a value
    left out.

    Where `own` leaves a setting open, transformers takes it from the model's own
    `generation_config`, and after that from its defaults (top_k=50 among them).

    Args:
        model: without data-parallel wrappers; adapters may be around it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prepare: Any = getattr(base, "_prepare_generation_config", None)
    with model_settings(model, model_settings_of(model)):
        if prepare is not None:
            merged = prepare(copy.deepcopy(own))[0]
        else:
            merged = copy.deepcopy(own)
            if getattr(base, "generation_config", None) is not None:
                merged.update(**base.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return {
        name: plain(value) for name, value in vars(merged).items() if value is not None and not name.startswith("_")
    }


def plain(value: Any) -> Any:
    """The value as JSON can hold it: objects become their dictionary, or else their text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else repr(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    to_dict = getattr(value, "to_dict", None)
    return plain(to_dict()) if callable(to_dict) else str(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """A setting that holds one token id, several or none, as a sorted tuple."""
    if value is None:
        return ()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(sorted({int(v) for v in (value if isinstance(value, list | tuple | set) else [value])}))
