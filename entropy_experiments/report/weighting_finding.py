"""What entropy the weighting schemes cost, and which differ from the step as trained; no more than their intervals show."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.weighting_results import WeightingResult
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, UNTOLD
from entropy_experiments.text.numbers import counted

_Named = tuple[str, StudentEstimate]


def weighting_finding(result: WeightingResult) -> str:
    """The price of reward in entropy over the schemes; where there is none, the changes at equal length."""
    rows = [row for row in result.rows if row.kind == "scheme" and row.cosine_with_run is not None]
    if not rows:
        return (
            "No weighting scheme can be compared with the run's own: with these rewards and weights none makes a step."
        )
    named = f"Of {counted(len(rows), 'weighting scheme')} on {counted(result.n_train, 'training sequence')}, "
    costs = [(row.label, cost) for row in rows if (cost := row.entropy_cost_per_reward) and cost.value is not None]
    if not costs:
        changes = [(row.label, row.delta_h.equal_length) for row in rows if row.delta_h is not None]
        span, order = _extremes(changes)
        return (
            f"{named}none has a predicted gain of reward whose 95% interval excludes 0, so what a unit of reward costs in "
            f"entropy is not given; in a step of the run's length entropy changes {span} nats per token ({BRACKETS}){order}."
        )
    gains = (
        f"{len(costs)} {'has' if len(costs) == 1 else 'have'} a predicted gain of reward whose 95% interval excludes 0"
    )
    span, order = _extremes(costs, plus=False)
    text = f"{named}{gains}; a unit of mean reward costs entropy {span} nats per token ({BRACKETS}){order}"
    priced = {label for label, _ in costs}
    known = [row.minus_run.equal_gain.known() for row in rows if row.label in priced and row.minus_run is not None]
    judged = [difference for difference in known if difference is not None and difference.holds_zero is not None]
    if not judged:
        run = result.rows[0].delta_h
        why = (None if run is None else run.equal_gain.reason) or "no error of the difference is known"
        return f"{text}; whether any differs from the step as trained {UNTOLD}: {why}."
    alike = sum(difference.holds_zero is True for difference in judged)
    return f"{text}; at equal gain {alike} of {len(judged)} {ALIKE} from the step as trained, by the paired difference."


def _extremes(estimates: Sequence[_Named], plus: bool = True) -> tuple[str, str]:
    """The smallest and the largest, each with its interval; one where there is one, and a word where the intervals overlap."""
    low, high = (pick(estimates, key=lambda named: named[1].value or 0.0) for pick in (min, max))
    ends = [f"{estimate.shown(plus)} ({label})" for label, estimate in (low, high)]
    least, most = low[1].known(), high[1].known()
    if low is high or least is None or most is None or least.value == most.value:
        return f"by {ends[0]}", ""
    overlap = least.high is None or most.low is None or least.high >= most.low
    order = (
        f"; which of them is the least {UNTOLD}, their intervals overlap" if overlap and least.low != least.high else ""
    )
    return f"from {ends[0]} to {ends[1]}", order
