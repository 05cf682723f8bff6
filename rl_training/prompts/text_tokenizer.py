"""The tokenizer that text goes through, where a trainer was given a processor.

A processor of a multimodal model (transformers' ProcessorMixin) holds its tokenizer as an
attribute, and often the chat template that the tokenizer lacks. Padding and end-of-sequence tokens,
decoding and text prompts are the tokenizer's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rl_training.errors import UserError, first_line


def text_tokenizer(processing_class: Any) -> Any:
    """A tokenizer as it is; of a processor its tokenizer, with the processor's chat template where
    it has none of its own.

    The processor's own tokenizer is left as it was.
    """
    inner = getattr(processing_class, "tokenizer", None)
    if inner is None or not hasattr(inner, "pad_token_id"):
        return processing_class
    template = getattr(processing_class, "chat_template", None)
    if getattr(inner, "chat_template", None) is None and template is not None:
        inner = copy.copy(inner)
        inner.chat_template = template
    return inner


@contextmanager
def panics_told() -> Iterator[None]:
    """A tokenizer whose pattern takes for ever on a text gives up, and raises what is no Exception: UserError here."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer gives up on a text ({first_line(error)[:200]}): its tokenizer.json is damaged or was tampered with; "
            "copy it again from the base model"
        ) from error


@panics_told()
def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone, without special tokens around it. Raises UserError as `panics_told` does."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
