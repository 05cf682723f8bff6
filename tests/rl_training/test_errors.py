"""What other libraries' errors say, as one line."""

import pytest

from rl_training.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (RuntimeError("\n  indented\nmore"), "indented"),
        (MemoryError(), "MemoryError"),
        (AssertionError("  "), "AssertionError"),
    ],
)
def test_the_first_line_or_the_errors_name(error: Exception, line: str) -> None:
    assert first_line(error) == line
