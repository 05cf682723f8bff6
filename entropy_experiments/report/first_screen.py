"""What the first screen of an analysis shows beside its verdict: which figure, what to do next, how large the change is."""

from __future__ import annotations

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.content import NextStep
from entropy_experiments.report.price_finding import NEXT, next_step_sentence
from entropy_experiments.text.numbers import plain, signed


def lead_figure(results: ResultsFolder) -> str:
    """The name of the figure beside the verdict: the run's course where it was recorded, else the analysed step."""
    return "training_history" if len(results.history) > 1 else "predicted_vs_actual"


def next_steps(results: ResultsFolder) -> list[NextStep]:
    """What the record says to do: mend what failed, then what keeps entropy at the least cost. May be empty."""
    steps = []
    failed = [check.name for check in results.run.self_checks if not check.passed]
    if failed:
        text = f"Use none of these numbers before the failed self-checks are explained: {', '.join(failed)}."
        steps.append(NextStep(text, "checks", "run.json: self_checks"))
    prices = finished(results.summary.analyses.prices)
    if prices is not None:
        sentence = next_step_sentence(prices)
        if sentence is not None:
            text = sentence.text.removeprefix(NEXT)  # the heading above it says so
            steps.append(NextStep(text[0].upper() + text[1:], "section-prices", "summary.json: analyses.prices"))
    return steps


def scale_of_the_change(summary: Summary) -> str:
    """The analysed step's predicted change beside the entropy before it, in words; "" where either is not known."""
    entropy = summary.entropy.per_token
    total = None if summary.prediction is None else summary.prediction.total
    if entropy is None or total is None or not entropy.value or total.value is None:
        return ""
    return (
        f"Here entropy is {plain(entropy.value)} nats per token before the step, and the step is predicted to change it by "
        f"{signed(total.value)}, {abs(total.value / entropy.value):.0%} of it."
    )
