"""How the completions of a run come about, read off the trainer itself: the one description that
everything else uses.

The prompt's template and its arguments, every setting that the generator will use, the stop rule
and the length, adapters, precision, and what makes training mode another function:
`describe_sampling` gathers it, the sidecar records it, and the probe, the analysis and `doctor`
read it. `departures` names what takes completions away from the distribution that is
differentiated. Knows trainers of TRL's kind by their attributes; imports none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rl_training.errors import UserError
from rl_training.generation.settings import (
    Departure,
    departures,
    final_settings,
    plain,
    token_ids,
)
from rl_training.generation.training_noise import training_noise
from rl_training.models.own_settings import model_settings_of
from rl_training.prompts.chat_prompts import PromptRendering, rendering_of, template_digest
from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.sampling import SamplingConfig

_OTHER_ENGINE = (
    "completions are drawn by another engine, in a precision of its own and by settings that cannot be read here; that they "
    "follow softmax(logits / temperature) is not known"
)
_ENVIRONMENT = (
    "something beside the policy has a say in prompts and completions; every token that is not marked as foreign is taken for "
    "drawn from softmax(logits / temperature), and no analysis can draw such completions anew"
)
_NO_IMAGES = (
    "TRL never draws the image token of a multimodal model: completions come from the softmax without it, and numbers are off "
    "by as much as it would have been drawn"
)
_CAST = "completions are drawn from weights rounded to half precision"
_INVOKED = (
    "the adapter acts from the last of these tokens on: a completion that draws them again is scored without it up to there, "
    "though it was drawn with it, so that log-probabilities and gradients are not those of the policy that drew"
)
_SOURCES = {
    "vllm_structured_outputs_regex": "completions are forced to match an expression",
}


@dataclass(frozen=True)
class SamplingDescription:
    """One run's way of drawing completions.

    Attributes:
        temperature, max_completion_length, eos_token_ids: as the generator has them in the end.
        generation: all of its settings that have a value; empty for an engine whose settings cannot
            be read.
        rendering: how prompts become tokens.
        training_noise: what is known to make training mode another function.
        departures: what takes completions away from softmax(logits / temperature), by name.
    """

    temperature: float
    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    generation: Mapping[str, Any]
    rendering: PromptRendering
    template_sha256: str | None
    dtype: str
    mixed_precision: str
    adapters: tuple[str, ...]
    training_noise: tuple[str, ...]
    departures: tuple[Departure, ...]

    @property
    def environment(self) -> str | None:
        """The argument of the trainer by which something beside the policy writes into completions,
        or None.
        """
        return next((d.name for d in self.departures if d.effect == _ENVIRONMENT), None)

    def sampling_config(self) -> SamplingConfig:
        """The distribution that fresh completions are drawn from, and that is differentiated."""
        return SamplingConfig(
            self.temperature,
            self.max_completion_length,
            self.eos_token_ids,
            self.pad_token_id,
            rendering=self.rendering,
        )

    def describe(self) -> list[str]:
        """A few lines for a person."""
        return sampling_lines(
            temperature=self.temperature,
            max_completion_length=self.max_completion_length,
            eos_token_ids=self.eos_token_ids,
            template_arguments=self.rendering.arguments,
            template_sha256=self.template_sha256,
            noise=self.training_noise,
            departing=self.departures,
        )


def describe_sampling(trainer: Any) -> SamplingDescription:
    """Of a trainer as it stands: call it when it is constructed, and again where something may have
    changed since.

    Raises:
        UserError: no end-of-sequence token is known, or the temperature is not positive.
    """
    args = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tokenizer = text_tokenizer(trainer.processing_class)
    own = getattr(trainer, "generation_config", None)
    drawn_here = own is not None and not getattr(args, "use_vllm", False)
    settings = final_settings(model, own) if drawn_here else {}
    temperature = float(settings.get("temperature") or args.temperature)
    longest = int(settings.get("max_new_tokens") or args.max_completion_length)
    cut_at = token_ids(getattr(trainer, "eos_token_ids", None)) or token_ids(tokenizer.eos_token_id)
    stops = token_ids(settings.get("eos_token_id")) or cut_at
    if not stops:
        raise UserError("neither the tokenizer nor the model names an end-of-sequence token: set tokenizer.eos_token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    rendering = rendering_of(trainer)
    return SamplingDescription(
        temperature=temperature,
        max_completion_length=longest,
        eos_token_ids=stops,
        pad_token_id=pad,
        generation=settings,
        rendering=rendering,
        template_sha256=template_digest(tokenizer, rendering),
        dtype=str(base.dtype).removeprefix("torch."),
        mixed_precision=str(trainer.accelerator.mixed_precision),
        adapters=tuple(sorted(str(getattr(c, "peft_type", c)) for c in getattr(model, "peft_config", {}).values())),
        training_noise=tuple(_noise(trainer, model)),
        departures=tuple(
            [
                *_of_engine(trainer, drawn_here),
                *_of_settings(trainer, base, settings),
                *_of_parameters(args, temperature, longest, stops, cut_at),
                *_of_model(base),
                *_of_adapters(model),
            ]
        ),
    )


def sampling_lines(
    temperature: float,
    max_completion_length: int,
    eos_token_ids: tuple[int, ...] | list[int],
    template_arguments: Mapping[str, Any],
    template_sha256: str | None,
    noise: tuple[str, ...] | list[str] = (),
    departing: tuple[Departure, ...] | list[Departure] = (),
) -> list[str]:
    """The sampling configuration in words, a line for each of its parts that says something."""
    stops = ", ".join(map(str, eos_token_ids))
    lines = [f"softmax(logits / {temperature:g}), until token {stops} or {max_completion_length} tokens"]
    named = {key: "..." if key in ("tools", "chat_template") else value for key, value in template_arguments.items()}
    digest = "" if template_sha256 is None else f" {template_sha256[:12]}"
    if template_sha256 is not None or named:
        lines.append(f"chat template{digest}" + (f" with {named}" if named else ""))
    if noise:
        lines.append("noise in training mode: " + ", ".join(noise))
    lines += [f"another distribution: {departure.sentence()}" for departure in departing]
    return lines


def _noise(trainer: Any, model: Any) -> list[str]:
    found = training_noise(model)
    alpha = getattr(trainer.args, "neftune_noise_alpha", None)
    return ([f"neftune_noise_alpha={alpha:g}"] if alpha else []) + found


def _of_engine(trainer: Any, drawn_here: bool) -> list[Departure]:
    """Completions that `model.generate` does not draw."""
    args, found = trainer.args, []
    if getattr(trainer, "rollout_func", None) is not None:
        name = getattr(trainer.rollout_func, "__name__", type(trainer.rollout_func).__name__)
        remedy = "none is needed where it draws from that softmax, and marks what it adds with 0 in env_mask"
        found.append(Departure("rollout_func", name, _ENVIRONMENT, remedy, tolerable=True))
    if getattr(trainer, "environment_factories", None):
        names = [str(name) for name in trainer.environment_factories if name]
        found.append(Departure("environment_factory", names, _ENVIRONMENT, "none is needed", tolerable=True))
    elif getattr(trainer, "tools", None):
        names = [getattr(tool, "__name__", str(tool)) for tool in trainer.tools]
        found.append(Departure("tools", names, _ENVIRONMENT, "none is needed", tolerable=True))
    if getattr(args, "use_vllm", False):
        found.append(Departure("use_vllm", True, _OTHER_ENGINE, "set use_vllm=False"))
    elif getattr(args, "use_transformers_continuous_batching", False):
        how = _CAST if args.bf16 or args.fp16 else _OTHER_ENGINE
        found.append(
            Departure(
                "use_transformers_continuous_batching", True, how, "set use_transformers_continuous_batching=False"
            )
        )
    elif not drawn_here:
        found.append(Departure("generation_config", None, _OTHER_ENGINE, "use a trainer that has one"))
    if getattr(args, "use_vllm", False) and getattr(args, "vllm_structured_outputs_regex", None):
        value = args.vllm_structured_outputs_regex
        found.append(
            Departure("vllm_structured_outputs_regex", value, _SOURCES["vllm_structured_outputs_regex"], "unset it")
        )
    return found


def _of_settings(trainer: Any, base: Any, settings: Mapping[str, Any]) -> list[Departure]:
    """Settings of the generator; of an engine that cannot be asked, those that it is given."""
    args, vocabulary = trainer.args, getattr(base.config.get_text_config(), "vocab_size", None)
    if not settings:
        given = {name: getattr(args, name, None) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        given["top_k"] = None if given["top_k"] == -1 else given["top_k"]
        return departures({**given, **_readable(args)}, vocabulary, "in the trainer's arguments")
    own = {name for name, value in vars(trainer.generation_config).items() if value is not None}
    of_run = {name: value for name, value in settings.items() if name in own}
    inherited = {name: value for name, value in settings.items() if name not in own}
    image = getattr(base.config, "image_token_id", None)
    return [
        *(
            replace(d, effect=_NO_IMAGES, tolerable=True) if d.name == "suppress_tokens" and d.value == [image] else d
            for d in departures(of_run, vocabulary, "in the trainer's arguments (generation_kwargs)")
        ),
        *departures(inherited, vocabulary, "in the model's generation_config, or in generation_kwargs"),
    ]


def _readable(args: Any) -> dict[str, Any]:
    return {name: plain(value) for name, value in dict(getattr(args, "generation_kwargs", None) or {}).items()}


def _of_parameters(
    args: Any, temperature: float, longest: int, stops: tuple[int, ...], cut_at: tuple[int, ...]
) -> list[Departure]:
    """The distribution's own parameters, where the generator's differ from those that the loss goes
    by.
    """
    found = []
    if temperature != float(args.temperature):
        effect = (
            f"completions are drawn at it while the loss differentiates temperature {args.temperature:g}: the trainer's gradient "
            "and log-probabilities are not those of the policy that draws; the probe's entropies are those at which completions "
            "are drawn"
        )
        found.append(Departure("temperature", temperature, effect, "set GRPOConfig(temperature=...) and no other"))
    if longest != int(args.max_completion_length):
        effect = (
            f"completions are cut there while the loss counts max_completion_length={args.max_completion_length} tokens"
        )
        found.append(Departure("max_new_tokens", longest, effect, "set max_completion_length and no other"))
    if set(stops) != set(cut_at):
        effect = (
            f"generation stops at these tokens while the trainer cuts completions at {list(cut_at)}: what stands behind the end "
            "is taken for drawn, or what was drawn is cut off"
        )
        remedy = "leave eos_token_id out of generation_kwargs, and set it in model.generation_config before the trainer is made"
        found.append(Departure("eos_token_id", list(stops), effect, remedy))
    return found


def _of_model(base: Any) -> list[Departure]:
    """A `generate` or a choice of logits processors that is not transformers' own."""
    found = []
    for name in ("generate", "_get_logits_processor", "_sample"):
        method = vars(base).get(name) or getattr(type(base), name, None)
        method = getattr(method, "__func__", method)
        if method is None or name in vars(base) or method.__module__ != "transformers.generation.utils":
            where = getattr(method, "__module__", None) or type(method).__name__
            found.append(Departure(f"model.{name}", f"of {where}", _OTHER_ENGINE, "use transformers' own"))
    return found


def _of_adapters(model: Any) -> list[Departure]:
    """Adapters that act on a sequence by what stands later in it (aLoRA)."""
    name = "alora_invocation_tokens"
    active = getattr(model, "active_adapters", ()) if hasattr(model, "peft_config") else ()
    tokens = [getattr(model.peft_config[adapter], name, None) for adapter in active]
    return [Departure(name, t, _INVOKED, "train LoRA without them, as an analysis needs it") for t in tokens if t]


class SettledSampling:
    """How completions are drawn, as it was when this was made, held against how they are drawn now."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._config = trainer, describe_sampling(trainer).sampling_config()
        self._before = _settings_now(trainer)

    def begin(self) -> None:
        """Training begins: what was changed before counts as there from the start, but for the distribution's own parameters."""
        if describe_sampling(self._trainer).sampling_config() == self._config:
            self._before = _settings_now(self._trainer)

    def hold(self, step: int) -> None:
        """Raises UserError where a setting has changed while training. step: of the optimizer, counted from 1."""
        now = _settings_now(self._trainer)
        odd = next((key for key in (*self._before, *now) if self._before.get(key) != now.get(key)), None)
        if odd is None:
            return
        raise UserError(
            f"{odd} changed from {self._before.get(odd)!r} to {now.get(odd)!r} before step {step}, while training: entropies "
            "before and after are of two distributions, and a record says one for the whole run; end the run there, and begin "
            "another from its checkpoint with the new setting"
        )


def _settings_now(trainer: Any) -> dict[str, Any]:
    """Every setting of the generator by name: the trainer's, those it hands on, and the model's own."""
    own = {
        "temperature": getattr(trainer, "temperature", None),
        "args.temperature": trainer.args.temperature,
        "args.max_completion_length": trainer.args.max_completion_length,
        "eos_token_ids": token_ids(getattr(trainer, "eos_token_ids", None)),
    }
    for place, config in (
        ("generation_config", getattr(trainer, "generation_config", None)),
        ("model.generation_config", model_settings_of(trainer.accelerator.unwrap_model(trainer.model))),
    ):
        values = {} if config is None else vars(config)
        own |= {f"{place}.{key}": plain(value) for key, value in values.items() if not key.startswith("_")}
    return own
