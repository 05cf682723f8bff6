"""Is the expression in a completion equal to the answer? By math-verify, which evaluates both: in
the sandbox alone.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def readable(answer: str) -> bool:
    """Whether math-verify finds mathematics in a reference answer."""
    return bool(_parse_answer(answer))


def _parse_answer(answer: str) -> list[Any]:
    from math_verify import parse

    # Bare LaTeX is understood too.
    bare_latex = "\\" in answer and not any(sign in answer for sign in ("$", "\\[", "\\(", "\\boxed"))
    return list(parse(f"${answer}$" if bare_latex else answer, parsing_timeout=None))


def score(answer: str, text: str) -> float:
    """1 where the expression that `text` ends in equals `answer`, else 0.

    Time is limited from outside.
    """
    from math_verify import parse, verify

    gold, found = _parse_answer(answer), parse(text, parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def warm_up() -> None:
    """Build the parser's tables once, before children are forked."""
    score("\\frac{1}{2}", "It is $\\sqrt{4}/4$, so \\boxed{0.5}")
