"""Prompts as tokens: chat messages through the chat template with the run's arguments, texts as
they are.

TRL's trainer renders prompts with `chat_template_kwargs`, with the schemas of its tools, and under
tools with a template of its own. Prompts that are to be those of the run must be rendered with all
of that, and by the same template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl_training.errors import UserError
from rl_training.prompts.limited_templates import TemplateError, limited_templates
from rl_training.prompts.text_tokenizer import panics_told, text_tokenizer

# What rendering itself decides; a record that says otherwise is not one of a run.
_DECIDED = frozenset(
    "conversation add_generation_prompt tokenize return_dict return_tensors return_assistant_tokens_mask continue_final_message "
    "padding truncation max_length tokenizer_kwargs sanitize_control_tokens".split()
)


@dataclass(frozen=True)
class PromptRendering:
    """How chat messages become text.

    Attributes:
        arguments: of the template beside the messages.
        contents_in_parts: a message's text is handed over as [{"type": "text", "text": ...}], as
            TRL does for processors.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    contents_in_parts: bool = False


def tokenize_prompts(
    tokenizer: Any, prompts: Sequence[Any], rendering: PromptRendering | None = None
) -> list[list[int]]:
    """Token ids of prompts: chat messages go through the chat template with its generation prompt,
    texts as they are.

    Args:
        rendering: as `rendering_of` finds it.

    Raises:
        UserError: arguments that the template does not take; a prompt that is neither text nor
            messages.
    """
    rendering = rendering or PromptRendering()
    arguments = dict(rendering.arguments)
    if wrong := sorted(_DECIDED & arguments.keys()):
        raise UserError(f"chat_template_kwargs sets {wrong[0]!r}, which is not for the template to say: leave it out")
    for prompt in prompts:
        if not isinstance(prompt, str | list | tuple):
            raise UserError(f"a prompt is a {type(prompt).__name__}: it must be a text or a list of chat messages")
    chats = [
        [_in_parts(message) for message in prompt] if rendering.contents_in_parts else prompt
        for prompt in prompts
        if not isinstance(prompt, str)
    ]
    rendered = iter(_render(tokenizer, chats, arguments))
    return [_of_text(tokenizer, prompt) if isinstance(prompt, str) else next(rendered) for prompt in prompts]


@panics_told()
def _of_text(tokenizer: Any, prompt: str) -> list[int]:
    try:
        return list(tokenizer(prompt)["input_ids"])
    except (TypeError, UnicodeError) as error:
        raise UserError(
            f"the prompt {prompt[:40]!r} holds half a character, which no tokenizer takes: mend the text"
        ) from error


@panics_told()
def _render(tokenizer: Any, chats: list[Any], arguments: dict[str, Any]) -> list[list[int]]:
    """Token ids of each chat, all rendered together."""
    if not chats:
        return []
    try:
        with limited_templates():
            encoded = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, **arguments
            )
    except Exception as error:  # a template raises whatever it likes
        given = f" with {sorted(arguments)}" if arguments else ""
        words = error.words if isinstance(error, TemplateError) else str(error).strip() or type(error).__name__
        raise UserError(f"the chat template cannot be rendered{given}: {words.splitlines()[0][:300]}") from error
    return [list(ids) for ids in encoded["input_ids"]]


def rendering_of(trainer: Any) -> PromptRendering:
    """What a GRPOTrainer gives the chat template beside the messages: its kwargs, its tools as
    schemas, a template of its own.

    All of it plain data, so that it can be recorded.
    """
    arguments = dict(getattr(trainer, "chat_template_kwargs", None) or {})
    if tools := getattr(trainer, "tools", None):
        from transformers.utils import get_json_schema

        arguments["tools"] = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    if getattr(trainer, "chat_template", None):
        arguments["chat_template"] = trainer.chat_template
    return PromptRendering(arguments, text_tokenizer(trainer.processing_class) is not trainer.processing_class)


def template_digest(tokenizer: Any, rendering: PromptRendering) -> str | None:
    """SHA-256 of the chat template that prompts are rendered with, as hexadecimal digits; None
    where there is none.
    """
    text = _template_text(tokenizer, rendering)
    if text is None:
        return None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def prints_the_date(tokenizer: Any, rendering: PromptRendering) -> bool:
    """Whether the chat template may put the day of rendering into a prompt, so that it is another prompt tomorrow.

    Arguments of the template that replace the date (`date_string` of Llama's) take that away.
    """
    text = _template_text(tokenizer, rendering)
    return text is not None and "strftime_now" in text and not any("date" in name for name in rendering.arguments)


def _template_text(tokenizer: Any, rendering: PromptRendering) -> str | None:
    template = rendering.arguments.get("chat_template") or getattr(tokenizer, "chat_template", None)
    return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)


def first_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    """For a message: where two renderings of one prompt part, in words."""
    place = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    shown = [repr(tokenizer.decode(list(ids[place : place + 8]))) for ids in (theirs, ours)]
    return f"{len(theirs)} against {len(ours)} tokens, from token {place} on {shown[0]} against {shown[1]}"


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}
