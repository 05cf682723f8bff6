"""A few changed files of every kind; everything that a campaign ever found; and that a campaign finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_training.errors import UserError
from tests.fuzz.campaign import campaign, kept, read
from tests.fuzz.targets import TARGETS, Target

QUICK = [target for target in TARGETS if not target.slow]


@pytest.mark.long
@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_a_few(target: Target) -> None:
    tally = campaign(target, 20.0, examples=30, first_seed=7, keep=False)
    assert tally.tried and not tally.findings


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.name)
def test_what_was_found_once(target: Target) -> None:
    for content in kept(target):
        read(target, content)


@pytest.mark.long
@pytest.mark.parametrize("target", [t for t in TARGETS if t.slow], ids=lambda target: target.name)
def test_the_slow_ones(target: Target) -> None:
    for content in kept(target):
        read(target, content)
    assert not campaign(target, 60.0, examples=30, keep=False).findings


def _wrong(content: bytes, folder: Path) -> None:
    if content[:3] != b"abc":
        raise UserError("not ours")
    if len(content) != 6:
        raise KeyError("length")


def test_a_parser_that_stumbles_is_found_and_the_file_made_small() -> None:
    tally = campaign(Target("wrong", lambda: [b"abcdef"], _wrong), 30.0, examples=300, keep=False)
    assert list(tally.findings) == ["KeyError"] and tally.taken < tally.tried
    two_lines = Target("lines", lambda: [b""], lambda content, folder: (_ for _ in ()).throw(UserError("a\nb")))
    with pytest.raises(AssertionError, match="several lines"):
        read(two_lines, b"x")
