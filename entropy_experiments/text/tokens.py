"""The text of each token of a completion, such that the pieces in a row give the text that the
tokens spell.

A tokenizer decodes tokens one by one only roughly: a character may be spread over several tokens
(most emoji are), and some tokenizers drop the space before the first token. So each piece is what
decoding grows by when its token is added, over the few tokens since the last whole character; the
tokens of an unfinished character have the empty piece and the last one has it all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 8  # tokens; what is not whole by then is no character, and stands as it decodes


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One piece of text a token of ``ids``; special tokens by their names."""
    pieces: list[str] = []
    before, done = 0, 0  # the tokens of the last piece begin at `before`; those from `done` on have no piece yet
    for end in range(1, len(ids) + 1):
        context = tokenizer.decode(ids[before:done]) if done > before else ""
        text = tokenizer.decode(ids[before:end])[len(context) :]
        if text.endswith(_UNFINISHED) and end - done < _LONGEST_CHARACTER and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text)
        before, done = done, end
    return pieces
