"""Formulas of the pages (`$...$` and `$$...$$`, as forges show them) become MathML, which browsers draw by themselves."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_CODE = re.compile(r"^( *)(```|~~~).*?^\1\2|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_INLINE = re.compile(r"(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<!\s)\$(?![\w$])", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with MathML in place of its formulas; code stays as it is."""
    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_drawn(markdown[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*pieces, _drawn(markdown[end:])])


def _drawn(text: str) -> str:
    text = _DISPLAY.sub(lambda found: convert(found.group(1), display="block"), text)
    return _INLINE.sub(lambda found: convert(found.group(1).replace("\n", " ")), text)
