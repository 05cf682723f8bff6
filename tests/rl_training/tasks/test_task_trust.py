"""What a task may name that a stranger wrote, and that the list of scorers that only compare is still true."""

import inspect
import re
import sys
from importlib.metadata import version
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from rl_training.config import TaskConfig
from rl_training.tasks.trust import COMPARING_SCORERS, COMPARING_VERSION, why_trust_is_needed

_EVALUATES = re.compile(
    r"\beval\(|\bexec\(|parse_expr|sympify|literal_eval|(?<!re\.)\bcompile\(|__import__|import_module|pickle|marshal"
    r"|subprocess|\bsympy\b|os\.system|\bgetattr\(|yaml|numexpr|loadtxt|fromstring|dateutil|\bopen\(answer"
)


def test_scorers_that_only_compare_do_no_more_in_the_installed_version() -> None:
    """If this fails with a new reasoning-gym: read the scorer, and take it off COMPARING_SCORERS unless it only compares."""
    assert version("reasoning-gym") == COMPARING_VERSION, (
        "read the scorers of this version, and say so in COMPARING_VERSION"
    )
    for name in sorted(COMPARING_SCORERS):
        dataset_class = DATASETS[name][0]
        for kind in dataset_class.__mro__[:-1]:
            if "score_answer" not in vars(kind):
                continue
            source = inspect.getsource(sys.modules[kind.__module__])
            found = _EVALUATES.search(source)
            assert found is None, f"{name}: {kind.__module__} holds {found and found[0]!r}"
            break


@pytest.mark.parametrize(
    "name", ["countdown", "puzzle24", "n_queens", "simple_integration", "codeio", "rearc", "composite", "none"]
)
def test_scorers_that_evaluate_want_trust(name: str) -> None:
    assert "may evaluate" in str(why_trust_is_needed({"name": name}))
    assert why_trust_is_needed({"name": name, "reward": "exact"}) is None, "the data set is made in the sandbox"


_HUGE = 10**12


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"reward": "os:system"}, "a reward function of its own, 'os:system'"),
        ({"reward": "./stranger.py:f"}, "a reward function"),
        ({"reward": "default:"}, "a reward function"),
        ({"reward": ["os:system"]}, "a reward function"),
        ({"reward": "math_verify"}, "'math_verify', which evaluates"),
        ({"reward": None}, "'None', which evaluates"),
        ({"source": "jsonl", "path": "/etc/passwd"}, "a file, '/etc/passwd'"),
        ({"source": "jsonl"}, "a file"),
        ({"source": "hub"}, "a file"),
        ({"path": "x.jsonl"}, "a file"),
        ({"size": _HUGE}, "a size of 1000000000000"),
        ({"heldout_size": _HUGE}, "a heldout_size"),
        ({"size": "many"}, "a size of many"),
        ({"size": float("nan")}, "a size of nan"),
        ({"reward_timeout": 1e9}, "a reward_timeout"),
        ({"reward_memory": 1 << 50}, "a reward_memory"),
        ({"arguments": {"max_terms": _HUGE}}, "arguments"),
        ({"arguments": {"operators": ["+" * 10_000]}}, "arguments"),
        ({"arguments": {"operators": ["+"] * 10_000}}, "arguments"),
        ({"arguments": {"a": [[[[[1]]]]]}}, "arguments"),
        ({"arguments": {"a": float("inf")}}, "arguments"),
        ({"arguments": "a"}, None),
    ],
)
def test_what_a_stranger_may_not_name(task: dict[str, Any], words: str | None) -> None:
    found = why_trust_is_needed(task)
    assert (found is None) if words is None else (found is not None and words in found and len(found) < 300)


def test_the_demo_and_its_like_want_none() -> None:
    assert why_trust_is_needed(TaskConfig().model_dump(mode="json")) is None
    for reward in ("default", "score_answer", "exact", "last_number"):
        assert why_trust_is_needed({"reward": reward, "arguments": {"max_terms": 3}, "size": 128}) is None
