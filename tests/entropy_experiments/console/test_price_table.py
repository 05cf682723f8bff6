"""The price list on terminals of several widths: whole intervals, reasons in one line, and what few prompts make of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from entropy_experiments.console.price import print_prices
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.price_results import MeasuredStep, PriceRow, PricesResult

REASON = "its weights are those of the step as trained"


def estimate(value: float) -> StudentEstimate:
    return StudentEstimate(value=value, standard_error=0.02, degrees_of_freedom=7.0)


def printed(width: int, terminal: bool = True, prompts: int = 32) -> list[str]:
    did = MeasuredStep(entropy=-0.16, reward=0.05, effective_sample_size=20.0)
    run = PriceRow(name="run", label="as trained", entropy=estimate(-0.18), reward=estimate(0.07), measured=did)
    differences = {"entropy_minus_run": estimate(0.09), "reward_minus_run": estimate(-0.03)}
    half = PriceRow(
        name="half", label="half the learning rate", entropy=estimate(-0.09), reward=estimate(0.03), **differences
    )
    without = [PriceRow(name=name, label=name, reason=REASON) for name in ("DAPO", "RLOO")]
    result = PricesResult(
        rows=(run, half, *without),
        alike=(),
        keeps=0.25,
        reward_note=None,
        n_eval=32,
        eval_prompts=prompts,
        judged_prompts=4,
    )
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_prices(console, result)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminal(width: int) -> None:
    lines = printed(width)
    text = "\n".join(lines[1:])
    assert max(map(len, lines[1:])) <= width
    assert width < 80 or "[−0.227, −0.133]" in text, "an interval was broken"
    assert ("δh less as trained" in text) == (width == 160)
    assert ("A wider terminal shows" in " ".join(text.split())) == (width != 160)
    assert f"DAPO, RLOO: not priced: {REASON}" in " ".join(text.split()), "the reason stood twice, a word a line"
    assert "The same steps, taken and measured" in " ".join(text.split()) and "−0.160" in text


def test_plain_lines_say_what_the_columns_are() -> None:
    lines = printed(80, terminal=False)
    assert lines[1].startswith("Predicted change of entropy, δh (nats per token), and of mean reward, δJ")
    assert any("; Effective sample 20" in line for line in lines) and f"RLOO: not priced: {REASON}" in lines


def test_few_prompts_are_named() -> None:
    assert not any("Intervals rest on" in line for line in printed(80))
    assert any("Intervals rest on 8 evaluation prompts" in line for line in printed(80, prompts=8))
