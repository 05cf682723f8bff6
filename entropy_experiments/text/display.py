"""Text that a model wrote, made safe and legible to look at: nothing in it acts, nothing in it is
invisible.

Completions hold anything: markup, terminal escapes, null bytes, characters that reverse the reading
order, lines of ten thousand characters. Escaping for HTML is the template's work; here control
characters become visible signs and long text is cut with a marker that says how much is missing.
"""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_JOINERS = {"\u200c", "\u200d"}  # several scripts and emoji need them


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or character in _JOINERS:
        return character
    # Cc, Cf, Cs: controls, format characters (reading order among them), halves of surrogate pairs;
    # Zl, Zp: separators.
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} or code & 0xFFFE == 0xFFFE:
        return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    return character


def visible(text: str) -> str:
    """``text`` with every control, format and surrogate character replaced by a sign for it; line
    ends are kept.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible_character, text))


def clip(text: str, limit: int, keep: str = "start") -> str:
    """``visible(text)``, cut to about ``limit`` characters with a marker that counts what was left
    out.

    ``keep`` says which part stays: "start", "end", or "both" (half of the limit each).
    """
    if len(text) <= limit:
        return visible(text)
    marker = f"[… {len(text) - limit:,} characters left out …]"
    if keep == "start":
        return f"{visible(text[:limit])} {marker}"
    if keep == "end":
        return f"{marker} {visible(text[len(text) - limit :])}"
    half = limit // 2
    return f"{visible(text[:half])} {marker} {visible(text[len(text) - (limit - half) :])}"


def one_line(text: str, limit: int, keep: str = "start") -> str:
    """``clip`` for a table cell: line ends become ↵, and no text at all becomes "(empty)"."""
    return clip(text, limit, keep).replace("\n", " ↵ ").strip() or "(empty)"


def quoted(text: str, limit: int = 60, keep: str = "start") -> str:
    """``text`` on one line in quotation marks; right-to-left text is isolated so that it cannot
    reorder the sentence.
    """
    line = clip(" ".join(text.split()), limit, keep)
    if any(unicodedata.bidirectional(character) in {"R", "AL"} for character in line):
        line = f"\N{FIRST STRONG ISOLATE}{line}\N{POP DIRECTIONAL ISOLATE}"
    return f"\N{LEFT DOUBLE QUOTATION MARK}{line}\N{RIGHT DOUBLE QUOTATION MARK}"


@dataclass(frozen=True)
class PromptFrame:
    """What all prompts have in common at their beginning and end: a system prompt, the chat
    template's marks.
    """

    prefix: str
    suffix: str

    def own_part(self, prompt: str) -> str:
        """The part of ``prompt`` between the common beginning and the common end."""
        return prompt[len(self.prefix) : len(prompt) - len(self.suffix)]


def prompt_frame(prompts: Sequence[str], minimum: int = 12) -> PromptFrame:
    """The common frame of ``prompts``: cut at a word boundary, and empty where shorter than
    ``minimum`` characters.
    """
    distinct = sorted(set(prompts))
    if len(distinct) < 2:
        return PromptFrame("", "")
    prefix = os.path.commonprefix(distinct)
    while prefix and not (prefix[-1].isspace() or prefix[-1] == ">"):
        prefix = prefix[:-1]
    remainders = [prompt[len(prefix) :] for prompt in distinct]
    suffix = os.path.commonprefix([remainder[::-1] for remainder in remainders])[::-1]
    while suffix and not (suffix[0].isspace() or suffix[0] == "<"):
        suffix = suffix[1:]
    return PromptFrame(prefix if len(prefix) >= minimum else "", suffix if len(suffix) >= minimum else "")
