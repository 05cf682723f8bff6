"""The plans of large models that the guide shows are those that the planner makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plans_on_paper import table

pytestmark = pytest.mark.long


def test_the_guide_shows_what_the_planner_says() -> None:
    assert table() in (Path(__file__).parents[1] / "docs/guides/large-kernels.md").read_text()
