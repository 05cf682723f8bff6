"""The tokenizer that text goes through, where a trainer was given a processor.

A processor of a multimodal model (transformers' ProcessorMixin) holds its tokenizer as an
attribute, and often the chat template that the tokenizer lacks. Padding and end-of-sequence tokens,
decoding and text prompts are the tokenizer's.
"""

from __future__ import annotations

import copy
from typing import Any


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
