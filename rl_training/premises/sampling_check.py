"""Whether a trainer draws completions from the distribution that is differentiated: its settings
are checked by name when it is made, its model by a few forward passes when training begins, and its
prompts when the first ones are rendered.

`DrGRPOTrainer` refuses what is found (SamplingGuard); in another trainer the entropy probe warns of
it once (SamplingWatcher).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from rl_training.errors import UserError, first_line
from rl_training.generation.description import SamplingDescription, SettledSampling, describe_sampling
from rl_training.generation.training_noise import silence_training_noise, train_mode_change, training_noise
from rl_training.premises.batch_dependence import LongestSequence
from rl_training.premises.drawn_as_scored import generation_finding
from rl_training.premises.full_precision import without_autocast
from rl_training.premises.gradient_premise import NOISE, PADDING, GradientPremise, is_sharded
from rl_training.premises.loss_reading import LossReader
from rl_training.premises.reward_range import watch_rewards
from rl_training.prompts.chat_prompts import first_difference, tokenize_prompts
from rl_training.prompts.left_padding import PaddingEffect, pass_positions, positions_matter
from rl_training.prompts.text_tokenizer import text_tokenizer

_TEXT = "One and two are three; 4 + 5 = 9, and 12 - 7 is 5."
_PROMPTS_COMPARED = 8
_TOKENS = 10
_SHORTER = (
    "keep prompts and completions within the context that is not extended (max_position_embeddings, or rope_parameters' "
    "original_max_position_embeddings), or take a scaling that does not depend on length (linear, yarn, llama3)"
)
_UNMARKED = (
    "rollout_func returned no env_mask: every token of its completions is taken for drawn by the policy; where it writes some "
    "itself, return env_mask, a list of 0 and 1 for each completion, with 0 on these"
)
_OTHER_MODEL = "train a model that draws what one forward pass gives (any with rotary positions and a plain cache does)"
_SHARDED = "the model is sharded over processes: whether training mode or left padding changes it was not checked"


def padding_effect(trainer: Any) -> PaddingEffect:
    """What left padding does to the trainer's model; see rl_training.prompts.left_padding."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with without_autocast(model):
        return positions_matter(
            model, _some_tokens(trainer), text_tokenizer(trainer.processing_class).pad_token_id or 0
        )


def longest_sequence(trainer: Any) -> LongestSequence:
    """Begins to watch whether the longest sequence of a batch changes the others; see
    rl_training.premises.batch_dependence.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    with without_autocast(model):
        return LongestSequence(model, _some_tokens(trainer))


def longest_finding(trainer: Any, watch: LongestSequence | None, length: int) -> str | None:
    """Of batches of `length` tokens, padding included; None where there is nothing to watch."""
    if watch is None:
        return None
    with without_autocast(trainer.accelerator.unwrap_model(trainer.model)):
        return watch.finding(length)


def drawing_finding(trainer: Any, temperature: float) -> str | None:
    """Whether the trainer's model draws by what it is scored by; see rl_training.premises.drawn_as_scored."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    pad = text_tokenizer(trainer.processing_class).pad_token_id or 0
    with without_autocast(model):
        return generation_finding(model, _some_tokens(trainer), temperature, pad)


def train_mode_finding(trainer: Any) -> str | None:
    """What training mode changes, by name where it is known, or None: two passes in training mode
    against one without.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    with without_autocast(model):
        change = train_mode_change(model, _some_tokens(trainer))
    named = training_noise(model)
    if alpha := getattr(trainer, "neftune_noise_alpha", None):
        named.insert(0, f"neftune_noise_alpha={alpha:g}")
    if not change and not named:
        return None
    size = f"; logits change by {change:.2g} of their standard deviation" if change else ""
    return f"training mode is another function than evaluation mode ({', '.join(named) or 'for no known reason'}{size})"


def prompt_finding(
    trainer: Any, description: SamplingDescription, prompts: Sequence[Any], token_ids: Sequence[Sequence[int]]
) -> str | None:
    """Where the trainer's prompts, as tokens, are not what its template and arguments make of the
    same prompts.
    """
    compared: list[Any] = []
    tokenizer = text_tokenizer(trainer.processing_class)
    for prompt, theirs in zip(prompts, token_ids, strict=False):
        if len(compared) == _PROMPTS_COMPARED:
            break
        if prompt in compared:
            continue
        compared.append(prompt)
        ours = tokenize_prompts(tokenizer, [prompt], description.rendering)[0]
        if ours != list(theirs):
            where = first_difference(ours, theirs, tokenizer)
            return (
                "the trainer's prompts are not what the chat template makes of the same rows with "
                f"{dict(description.rendering.arguments) or 'no arguments'}: {where}"
            )
    return None


class SamplingGuard(TrainerCallback):
    """The checks of a DrGRPOTrainer, made at the end of its construction: settings are refused by
    name, noise is switched off.

    Raises:
        UserError: whatever takes completions or the loss away from the distribution that is
            recorded.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._unpaddable: str | None = None
        self._positions: Any = None
        self._longest: LongestSequence | None = None
        self._prompts_seen = self._masks_seen = False
        self._told: set[str] = set()
        silence_training_noise(trainer.accelerator.unwrap_model(trainer.model))
        self.description = self._held()
        self._settled = SettledSampling(trainer)

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Raises UserError where a setting of the generator has changed since training began."""
        self._settled.hold(state.global_step + 1)

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.description, self._settled = self._held(), SettledSampling(self._trainer)
        if is_sharded(self._trainer):  # no forward pass outside the trainer's own
            warnings.warn(_SHARDED, RuntimeWarning, stacklevel=2)
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if (noise := train_mode_finding(self._trainer)) is not None:
            raise UserError(f"{noise}: the loss would be that of another policy than the one that draws; take that out")
        if (drawn := drawing_finding(self._trainer, self.description.temperature)) is not None:
            raise UserError(f"{drawn}: no number would be the policy's; {_OTHER_MODEL}")
        effect = padding_effect(self._trainer)
        if effect.kind == "positions" and self._positions is None:
            self._positions = pass_positions(model)
        name = type(_base(model)).__name__
        self._unpaddable = effect.sentence(name) if effect.kind == "always" else None
        self._longest = longest_sequence(self._trainer)

    def check_round(self, rows: Sequence[dict[str, Any]], output: dict[str, Any]) -> None:
        """Of a round of generation: its prompts' tokens (the first time), and whether padding can
        be borne.
        """
        if self._unpaddable is not None and not bool(output["prompt_mask"].bool().all()):
            raise UserError(
                f"{self._unpaddable}; passing positions does not help: train on prompts of one length in tokens, or another model"
            )
        length = output["prompt_ids"].shape[1] + output["completion_ids"].shape[1]
        if (found := longest_finding(self._trainer, self._longest, length)) is not None:
            raise UserError(f"{found}; {_SHORTER}")
        if getattr(self._trainer, "rollout_func", None) is not None:
            if not self._masks_seen and "tool_mask" not in output:
                warnings.warn(_UNMARKED, UserWarning, stacklevel=3)
            self._masks_seen = True
            return
        if self._prompts_seen:
            return
        self._prompts_seen = True
        ids = [row[mask.bool()].tolist() for row, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
        prompts = [row["prompt"] for row in rows]
        if (found := prompt_finding(self._trainer, self.description, prompts, ids)) is not None:
            raise UserError(
                f"{found}; an analysis could not draw from the same prompts: render them in the dataset (prompts as text), or "
                "leave images and tools of each row's own out"
            )

    def _held(self) -> SamplingDescription:
        description = describe_sampling(self._trainer)
        for departure in description.departures:
            if not departure.tolerable:
                raise UserError(departure.sentence())
            if departure.name not in self._told:
                self._told.add(departure.name)
                warnings.warn(departure.sentence(), UserWarning, stacklevel=3)
        return description


class SamplingWatcher(TrainerCallback):
    """Warns, once for each finding, of what makes the probe's or the controller's numbers other than the trainer's.

    Stops nothing.

    Silent in a DrGRPOTrainer, whose SamplingGuard warns and refuses.
    """

    def __init__(self, trainer: Any, description: SamplingDescription, who: str = "entropy probe") -> None:
        self._trainer, self._who, self._told = trainer, who, set[str]()
        self._of_padding: str | None = None
        self._longest: LongestSequence | None = None
        self._masks_seen, self._plain = False, True
        self._reader = LossReader.of(trainer)
        self._kept = any(isinstance(callback, SamplingGuard) for callback in trainer.callback_handler.callbacks)
        self._tell([departure.sentence() for departure in description.departures])
        if not self._kept:
            watch_rewards(trainer, lambda sentence: self._tell([sentence], of="rewards"))

    @classmethod
    def attach(cls, trainer: Any, description: SamplingDescription, who: str) -> None:
        """Have a trainer watched, unless it is: `who` speaks."""
        if not any(isinstance(callback, cls) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(cls(trainer, description, who))

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        if self._kept:
            return
        found: list[str] = []
        for look in (self._of_the_settings, self._of_the_model, self._of_the_drawing):
            try:
                found += look()
            except Exception as error:  # the probe stops nothing but itself; it says so where it could not look
                found.append(
                    "whether completions follow the sampling configuration could not be checked "
                    f"({type(error).__name__}: {first_line(error)})"
                )
        self._tell(found)

    def _of_the_settings(self) -> list[str]:
        departures = describe_sampling(self._trainer).departures
        self._plain = not any(departure.name.startswith("model.") for departure in departures)
        return [departure.sentence() for departure in departures]

    def _of_the_drawing(self) -> list[str]:
        if is_sharded(self._trainer) or not self._plain:  # a `generate` of one's own is named already
            return []
        found = drawing_finding(self._trainer, describe_sampling(self._trainer).temperature)
        return (
            []
            if found is None
            else [f"{found}: predicted and measured changes are those of the latter; {_OTHER_MODEL}"]
        )

    def _of_the_model(self) -> list[str]:
        if is_sharded(self._trainer):
            return [_SHARDED]
        found = []
        self._longest = longest_sequence(self._trainer)
        if (noise := train_mode_finding(self._trainer)) is not None:
            GradientPremise.of(self._trainer).told.add(NOISE)
            found.append(
                f"{noise}: TRL draws completions and takes the loss with that noise, while predicted and measured changes are "
                "those of the model without; shares of the step and `fused` do not hold; set it to 0"
            )
        effect = padding_effect(self._trainer)
        sentence = effect.sentence(type(_base(self._trainer.accelerator.unwrap_model(self._trainer.model))).__name__)
        if sentence is not None:
            positions = (
                "pass positions (rl_training.prompts.left_padding.pass_positions(trainer.model) before training)"
            )
            remedy = positions if effect.kind == "positions" else "train another model"
            self._of_padding = (
                f"{sentence}; predicted and measured changes are those of the step taken, but log-probabilities and shares that "
                f"come from the trainer are wrong; train on prompts of one length in tokens, or {remedy}"
            )
        return found

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        """What only a step's own sequences show: padding is said once there is some, prompts of one
        length have none.
        """
        if self._of_padding is not None and (self._reader is None or self._reader.pads_prompts()):
            GradientPremise.of(self._trainer).told.add(PADDING)
            self._tell([self._of_padding])
            self._of_padding = None
        length = 0 if self._reader is None else self._reader.longest()
        if (found := longest_finding(self._trainer, self._longest, length)) is not None:
            self._longest = None
            self._tell([f"{found}; numbers of such steps are those of neither; {_SHORTER}"])
        kept = getattr(self._trainer, "_buffered_inputs", None)
        if not self._masks_seen and kept and isinstance(kept[0], dict):
            self._masks_seen = True
            if getattr(self._trainer, "rollout_func", None) is not None and "tool_mask" not in kept[0]:
                self._tell([_UNMARKED])

    def _tell(self, found: Sequence[str], of: str | None = None) -> None:
        """Warn of findings, of each once.

        Args:
            of: a subject that is spoken of once, whatever the words.
        """
        for sentence in found:
            if (of or sentence) not in self._told and not self._kept:
                self._told.add(of or sentence)
                warnings.warn(f"{self._who}: {sentence}", UserWarning, stacklevel=3)


class FirstPrompts:
    """Listens to the first prompts that the trainer renders, and to no others: `finding` is what
    `prompt_finding` found.

    TRL renders prompts in `_tokenize_prompts`; of a trainer that has none, nothing is known and
    nothing found.
    """

    def __init__(self, trainer: Any, description: SamplingDescription) -> None:
        self.finding: str | None = None
        original, name = getattr(trainer, "_tokenize_prompts", None), "_tokenize_prompts"
        if original is None:
            return
        of_its_own, heard = name in vars(trainer), []

        def once(prompts: Any, *args: Any, **kwargs: Any) -> Any:
            rendered = original(prompts, *args, **kwargs)
            if vars(trainer).get(name) is once:  # somebody may have put another one around it
                vars(trainer).update({name: original}) if of_its_own else vars(trainer).pop(name)
            if not heard:
                heard.append(True)
                self.finding = prompt_finding(trainer, description, prompts, rendered[0])
            return rendered

        trainer._tokenize_prompts = once

    def require_ours(self) -> None:
        """Raises UserError where the first prompts were rendered otherwise."""
        if self.finding is not None:
            raise UserError(
                f"{self.finding}; completions of held-out prompts would be those of other prompts: give prompts as text (the "
                "probe alone can watch the run's own, rollouts=current)"
            )


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _some_tokens(trainer: Any) -> list[int]:
    size = _base(trainer.accelerator.unwrap_model(trainer.model)).config.get_text_config().vocab_size
    ids = [int(i) % size for i in text_tokenizer(trainer.processing_class)(text=_TEXT)["input_ids"]]
    return ids[:_TOKENS] or [0]
