"""One module keeps the words of claims: the guide has the same list, and no other module uses them by itself."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from entropy_experiments.records.estimates import NO_ESTIMATE, Estimate, StudentEstimate
from entropy_experiments.records.evolution import ReasonedMean
from entropy_experiments.statistics import confidence
from entropy_experiments.statistics.agreement import paired_agreement
from entropy_experiments.statistics.confidence import (
    AGREE,
    ALIKE,
    DISAGREE,
    FELL,
    NO_CHANGE,
    NOT_FROM_ZERO,
    ROSE,
    UNDETERMINED,
    UNTOLD,
    Known,
    agreement_sentence,
    change_word,
    correlation_words,
    few_prompts_sentence,
    shown,
)
from entropy_experiments.statistics.correlation import correlation

ROOT = Path(__file__).resolve().parents[3]
WORDS = (FELL, ROSE, NO_CHANGE, AGREE, DISAGREE, ALIKE, NOT_FROM_ZERO, UNDETERMINED, UNTOLD)
DIFFERENCES = np.tile([1.0, -1.0], 16) / np.sqrt(31)  # left-out values of a jackknife error of 1


def test_the_guide_has_every_word():
    table = (ROOT / "docs/guides/reading-a-verdict.md").read_text(encoding="utf-8")
    for word in WORDS:
        assert f"**{word}**" in table, word


@pytest.mark.parametrize(
    ("value", "error", "freedom", "word"),
    [
        (-0.5, 0.2, 60.0, FELL),
        (0.5, 0.2, 60.0, ROSE),
        (-0.5, 0.2, 3.0, NO_CHANGE),  # 3.18 errors reach further than 2
        (-0.5, 0.4, 60.0, NO_CHANGE),
        (-0.5, None, None, NO_CHANGE),
    ],
)
def test_a_change_is_one_where_its_interval_says_so(value, error, freedom, word):
    number = StudentEstimate(value=value, standard_error=error, degrees_of_freedom=freedom)
    assert change_word(number.known()) == word


def test_what_is_not_known_is_said():
    assert shown(None) == "not known" and NO_ESTIMATE.shown() == "not known"
    assert ReasonedMean(value=0.5, standard_error=None, reason="few").known() == Known(0.5)


@pytest.mark.parametrize(("gap", "error", "word"), [(0.01, 0.03, AGREE), (0.01, 0.3, ALIKE), (0.2, 0.03, DISAGREE)])
def test_agreement_needs_a_narrow_interval(gap, error, word):
    text = agreement_sentence(paired_agreement(gap, error * DIFFERENCES), -1.0)
    assert text.startswith(f"They {word}: they differ by +0.") and "[" in text


def test_correlations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    assert correlation_words(correlation(x, x + 0.1 * rng.normal(size=40)), 40).startswith("correlation 0.99")
    assert correlation_words(correlation(x, rng.normal(size=40)), 40).startswith("correlation undetermined, ")
    assert correlation_words(None, 2) == "no correlation of 2 steps"


def test_intervals_are_cut_at_what_they_know():
    assert Known(-0.26512, -0.38999, -0.14011).text() == "−0.27 [−0.39, −0.14]"
    assert Known(1.0).text() == "+1.00 (no interval)" and Known(0.0, 0.0, 0.0).text() == "0 (exact)"


# "agree" by itself names quantities and keys; as a claim it has a subject.
CLAIMS = re.compile(
    r"\bfell\b|\brose\b|no clear change|hardly changed|[Tt]hey agree|do NOT agree|does NOT agree"
    r"|agrees with the (prediction|measure)|be distinguished|significantly different"
    r"|told apart|told from 0|told from zero|distinguishable"
    r"|standard errors? (apart|of 0)|undetermined"
)


def literals(path):
    """(line, text) of every string of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented | bare:
            yield node.lineno, node.value


def test_no_other_module_words_a_claim():
    own = Path(confidence.__file__)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]!r}"
        for path in sorted((ROOT / "entropy_experiments").rglob("*.py"))
        if path != own
        for line, text in literals(path)
        if CLAIMS.search(text)
    ]
    assert not found, "take the words from statistics/confidence.py:\n" + "\n".join(found)


def test_what_few_prompts_are_worth_is_said() -> None:
    said = few_prompts_sentence(8) or ""
    assert "8 evaluation prompts: of so few, what is called 95% covers about 90%" in said
    assert few_prompts_sentence(12) is None and few_prompts_sentence(64) is None
    assert few_prompts_sentence(1) is None, "a single prompt has no interval"


def test_few_prompts_that_carry_an_interval_are_said() -> None:
    carried, ordinary = 6.3, 31.0
    of = few_prompts_sentence(48, {"predicted": carried, "measured": ordinary})
    assert of is not None and "Few of the 48 evaluation prompts carry the error of the predicted change" in of
    assert "worth 6 degrees of freedom of 47" in of
    both = few_prompts_sentence(48, {"predicted": carried, "measured": carried})
    assert both is not None and "predicted and the measured change" in both
    assert few_prompts_sentence(48, {"predicted": ordinary, "measured": None}) is None


def test_ends_that_are_stored_are_taken_before_students() -> None:
    stored = {"value": 1.0, "standard_error": 0.1, "degrees_of_freedom": 5.0}
    assert StudentEstimate(**stored, low=0.7, high=1.9).known() == Known(1.0, 0.7, 1.9)
    untrusted = Estimate(**stored, low=None, high=None).known()
    assert untrusted == Known(1.0) and untrusted.holds_zero is None
