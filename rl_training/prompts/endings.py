"""How a completion came to its end.

ended         the policy drew an end-of-sequence token, the last of the completion
truncated     the last token is the policy's and ends nothing: the completion was cut at the maximum length
environment   the last token is foreign: a tool or an environment had the last word
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

Ending = Literal["ended", "truncated", "environment"]
ENDINGS: tuple[Ending, ...] = ("ended", "truncated", "environment")


def ending(completion_ids: Sequence[int], drawn: Sequence[bool] | None, eos_token_ids: Collection[int]) -> Ending:
    """Of one completion; drawn: which of its tokens the policy drew, None for all of them."""
    if drawn is not None and not drawn[-1]:
        return "environment"
    return "ended" if completion_ids[-1] in eos_token_ids else "truncated"
