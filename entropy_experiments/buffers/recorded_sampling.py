"""What a checkpoint's record says of how completions came about, checked against what an analysis
would do.

An analysis draws from softmax(logits / T), behind prompts that the checkpoint's tokenizer renders.
A run whose generator did anything else, or whose prompts were rendered otherwise, is another policy
on other data: refused by name, with what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from entropy_experiments.checkpoint_loader import Checkpoint
from rl_training.errors import UserError
from rl_training.generation.description import sampling_lines
from rl_training.generation.settings import Departure, departures, token_ids
from rl_training.prompts.chat_prompts import (
    PromptRendering,
    first_difference,
    prints_the_date,
    template_digest,
    tokenize_prompts,
)
from rl_training.run.rollouts import read_rollouts, rollouts_path
from rl_training.run.sidecar import SidecarSampling
from rl_training.sampling import SamplingConfig
from rl_training.tasks.task import Task

_PROMPTS_COMPARED = 8


def recorded_departures(sampling: SidecarSampling, vocabulary_size: int | None = None) -> list[Departure]:
    """Settings of the run's generator under which completions were not drawn from what is analysed."""
    found = departures(sampling.generation, vocabulary_size, "in the run")
    try:
        ends = list(token_ids(sampling.generation.get("eos_token_id")))
    except (TypeError, ValueError, OverflowError):
        ends = ["no token ids"]
    for name, recorded, ours in (
        ("temperature", sampling.generation.get("temperature"), sampling.temperature),
        ("max_new_tokens", sampling.generation.get("max_new_tokens"), sampling.max_completion_length),
        ("eos_token_id", ends, sorted(sampling.eos_token_ids)),
    ):
        if recorded not in (None, []) and recorded != ours:
            found.append(
                Departure(name, recorded, f"the record itself says {ours} elsewhere", "analyse another checkpoint")
            )
    if sampling.training_noise:
        effect = "completions and loss of the run had noise that an analysis has not"
        found.append(Departure("training_noise", ", ".join(sampling.training_noise), effect, "train without it"))
    return found


def recorded_rendering(sampling: SidecarSampling) -> PromptRendering:
    """How the run made tokens of its prompts."""
    return PromptRendering(sampling.chat_template_kwargs, sampling.contents_in_parts)


def recorded_sampling(sampling: SidecarSampling) -> list[str]:
    """The record in words, for `doctor`: a line for each part, and one for each departure."""
    return sampling_lines(
        temperature=sampling.temperature,
        max_completion_length=sampling.max_completion_length,
        eos_token_ids=sampling.eos_token_ids,
        template_arguments=sampling.chat_template_kwargs,
        template_sha256=sampling.chat_template_sha256,
        departing=recorded_departures(sampling),
    )


def refuse_another_distribution(checkpoint: Checkpoint) -> None:
    """Raises UserError where the run drew from another distribution, or with another chat template
    than the checkpoint's.

    An image token that TRL never drew is allowed: here it is drawn as often as the policy would.
    """
    sidecar, folder = checkpoint.record.sidecar, checkpoint.record.path
    if sidecar is None:
        return
    sampling = sidecar.sampling
    model = getattr(checkpoint.model, "config", None)
    vocabulary = getattr(model.get_text_config(), "vocab_size", None) if hasattr(model, "get_text_config") else None
    found = recorded_departures(sampling, vocabulary)
    found = [d for d in found if d.name != "suppress_tokens" or d.value != [getattr(model, "image_token_id", None)]]
    if found:
        raise UserError(f"{folder} was sampled with {found[0].sentence()}, and analyse a checkpoint of that")
    if sampling.chat_template_sha256 is None:
        return
    digest = template_digest(checkpoint.tokenizer, recorded_rendering(sampling))
    if digest != sampling.chat_template_sha256:
        raise UserError(
            f"the chat template beside {folder} is not the one of the run (SHA-256 {(digest or 'none')[:12]}, recorded "
            f"{sampling.chat_template_sha256[:12]}): prompts would be others; put back the tokenizer files that the run saved "
            "there (chat_template.jinja, tokenizer_config.json)"
        )


def refuse_other_prompts(checkpoint: Checkpoint, sampling_config: SamplingConfig, task: Task) -> None:
    """Hold the task's prompts, rendered here, against those recorded with the run's step, where
    they are recorded.

    Raises:
        UserError: tokens differ.
    """
    record = checkpoint.record
    if record.sidecar is None or not rollouts_path(record.run_dir, record.step).exists():
        return
    rows = {int(row["prompt_index"]): row for row in [*task.train, *task.heldout]}
    recorded = {
        s.prompt_index: s.prompt_ids for s in read_rollouts(record.run_dir, record.step) if s.prompt_index is not None
    }
    for number in [n for n in recorded if n in rows][:_PROMPTS_COMPARED]:
        ours = tokenize_prompts(checkpoint.tokenizer, [rows[number]["prompt"]], sampling_config.rendering)[0]
        theirs: Sequence[int] = list(recorded[number])
        if ours != theirs and prints_the_date(checkpoint.tokenizer, sampling_config.rendering):
            raise UserError(
                f"prompt {number} of the task is not what the run trained on "
                f"({first_difference(ours, theirs, checkpoint.tokenizer)}), and the chat template prints the date of the day "
                "(strftime_now), which was another one then: train with the date among chat_template_kwargs where the template "
                "takes it (date_string), or give the task with checkpoint.task to analyse on prompts of today's date"
            )
        if ours != theirs:
            raise UserError(
                f"prompt {number} of the task, rendered with the tokenizer of {record.path}, is not what the run trained on "
                f"({first_difference(ours, theirs, checkpoint.tokenizer)}): the task or the chat template has changed; put back "
                f"the tokenizer files of the run, or give the task it was trained on with checkpoint.task"
            )


def warn_of_the_date(checkpoint: Checkpoint, sampling_config: SamplingConfig) -> None:
    """A warning where prompts hold the day on which they are rendered."""
    if prints_the_date(checkpoint.tokenizer, sampling_config.rendering):
        warnings.warn(
            f"the chat template beside {checkpoint.record.path} prints the date (strftime_now): prompts of this analysis hold "
            "today's, the run's that of its own day, and analyses of other days differ in that as well",
            stacklevel=3,
        )


def sampling_in_words(folder: Path, sampling: SidecarSampling) -> list[str]:
    """Like `recorded_sampling`, with a line on whether the folder's own tokenizer files still hold
    the run's template.
    """
    lines = recorded_sampling(sampling)
    template = folder / "chat_template.jinja"
    if (
        sampling.chat_template_sha256 is None
        or "chat_template" in sampling.chat_template_kwargs
        or not template.exists()
    ):
        return lines
    from hashlib import sha256

    if sha256(template.read_text(encoding="utf-8").encode()).hexdigest() != sampling.chat_template_sha256:
        lines.append(
            f"another distribution: {template.name} is not the chat template of the run; put back the one that it saved"
        )
    return lines
