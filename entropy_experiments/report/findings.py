"""What each analysis found, in one sentence: from its record, and no more than its intervals and tests show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from entropy_experiments.records.attribution_results import AttributionResult
from entropy_experiments.records.kernel_results import BuffersResult, Quantity
from entropy_experiments.records.step_results import (
    BaselineRow,
    BaselinesResult,
    EntropyPredictionResult,
    HigherOrderResult,
    InterventionResult,
)
from entropy_experiments.report.analysis_tables import with_ends
from entropy_experiments.report.kernel_findings import clustering_finding, structure_finding
from entropy_experiments.report.price_finding import price_finding
from entropy_experiments.report.weighting_finding import weighting_finding
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, DISAGREE, NOT_FROM_ZERO, UNTOLD, UNTRUSTED, Known
from entropy_experiments.text.numbers import counted, plain, signed

_UNIT = "nats per token"
_QUANTITIES: dict[Quantity, tuple[str, str, str, str]] = {
    "length": ("completion length", "tokens", "longer", "shorter"),
    "entropy": ("token entropy", _UNIT, "more undecided", "more decided"),
    "reward": ("reward", "", "rewarded higher", "rewarded lower"),
    "truncated": ("cuts at the maximum length", "", "cut more often", "cut less often"),
}
"""name -> label, unit, and what a training buffer with larger, or with smaller, values is."""


def buffers_finding(result: BuffersResult) -> str:
    """In which quantities the buffers differ beyond chance."""
    length = result.quantities["length"]
    training = counted(length.training.sequences, "training sequence")
    lead = f"Beside {counted(length.evaluation.sequences, 'evaluation sequence')}, {training}"
    found, tested = [], []
    for name, (label, unit, larger, smaller) in _QUANTITIES.items():
        quantity = result.quantities[name]
        if quantity.p_value is not None:
            tested.append(label)
        if quantity.differs:
            word = larger if (quantity.probability_larger.value or 0.0) > 0.5 else smaller
            means = f"{plain(quantity.training.mean)} against {plain(quantity.evaluation.mean)} {unit}".rstrip()
            found.append(f"{word} ({means} on average, p = {plain(quantity.p_value, 2)})")
    if found:
        listed = found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"
        return f"{lead} are {listed}."
    if not tested:
        return f"Whether {lead[0].lower()}{lead[1:]} differ {UNTOLD}: {length.reason}."
    return f"{lead} differ beyond chance in none of {', '.join(tested)}."


def prediction_finding(result: EntropyPredictionResult) -> str:
    """Where the first order stops being enough, and what it said of the step itself."""
    first = result.first_order
    if first.reason:
        return f"Where the first order stops being enough {UNTOLD}: {first.reason}."
    holds, fails, within = first.holds_to, first.fails_at, f"{first.tolerance:.0%}"
    ends = None if fails is None else _departure(result, fails)[1]
    off = {scale: _off(result, scale) for scale in (holds, fails) if scale is not None}
    if fails is None:
        assert holds is not None
        text = (
            f"The first order is within {within} of the measured change at every scale tested that can be trusted, up to "
            f"{plain(holds)} times the step ({off[holds]} there)"
        )
    elif ends is not None and ends[0] <= first.tolerance:
        least = ", the least tested," if holds is None else f" ({off[holds]} at {plain(holds)} times)"
        text = (
            f"Where the first order stops being enough {UNTOLD}: on these prompts it passes {within} by {plain(fails)} times the "
            f"step{least}, {off[fails]} there ({BRACKETS}), and others may put it elsewhere"
        )
    elif holds is None:
        text = (
            f"The first order is not enough at any scale tested: already at {plain(fails)} times the step it is "
            f"{off[fails]} the measured change"
        )
    else:
        text = (
            f"The first order stops being enough at about {plain(first.crossing, 2)} times the step: it is within "
            f"{within} of the measured change up to {plain(holds)} times ({off[holds]}) and {off[fails]} at {plain(fails)} times"
        )
    taken = next((row for row in result.rows if row.scale == 1.0), None)
    compared = None if taken is None else next((c for c in taken.comparisons if c.ratio is not None), None)
    if taken is not None and compared is not None:
        predicted, measured = taken.predicted[compared.estimator], taken.measured[compared.measure]
        doubt = f", a prediction that {NOT_FROM_ZERO}" if compared.near_zero else ""
        doubt += f"; {UNTRUSTED}" if measured.trustworthy is False else ""
        text += (
            f"; for the step itself {predicted.shown()} {_UNIT} were predicted and {measured.shown()} measured "
            f"(ratio {compared.ratio:.2f}{doubt}; {BRACKETS})"
        )
    return text + "."


def _departure(result: EntropyPredictionResult, scale: float) -> tuple[float, tuple[float, float] | None]:
    """By what part of the larger of both the first order is off at a scale, and the 95% interval of that, where it is known."""
    first = result.first_order
    value = next(d.departure for d in first.departures if d.scale == scale)
    row = next(row for row in result.rows if row.scale == scale)
    compared = next((c for c in row.comparisons if (c.estimator, c.measure) == (first.estimator, first.measure)), None)
    if first.estimator is None or first.measure is None or compared is None:
        return value, None
    sides = row.predicted[first.estimator].value, row.measured[first.measure].value
    size = max(abs(side or 0.0) for side in sides)
    if compared.low is None or compared.high is None or not size:
        return value, None
    gap = Known(compared.difference or 0.0, compared.low, compared.high)
    return value, (gap.smallest / size, gap.largest / size)


def _off(result: EntropyPredictionResult, scale: float) -> str:
    """``4.3% [0%, 21%] off``."""
    value, ends = _departure(result, scale)
    told = f"{value:.1%}" if value <= result.first_order.tolerance else f"{value:.0%}"
    return f"{told} off" if ends is None else f"{told} [{ends[0]:.0%}, {ends[1]:.0%}] off"


def higher_order_finding(result: HigherOrderResult) -> str:
    """How large the second order is beside the first, and where both are equal."""
    second, equal = result.second_order, result.equal_at
    if second.value is None:
        return f"The second order was not measured: {result.reason}."
    text = (
        f"For the step as taken the second order is {second.shown()} {_UNIT} "
        f"beside a first order of {result.first_order.shown()} by the split estimator ({BRACKETS})"
    )
    if equal.value is None:
        return f"{text}; {result.reason}."
    text += f"; the two are equal in size at s* = {plain(equal.value, 2)} times the step"
    if second.total_error is None:
        return text + "."
    upper = f"to {plain(equal.high, 2)}" if equal.high is not None else "upwards without an end"
    return f"{text} (95% interval: {plain(equal.low, 2)} {upper})."


def attribution_finding(result: AttributionResult) -> str:
    """How many sequences lowered and raised entropy, and how far a few of them make up the change."""
    shares = result.concentration
    if shares.all.top_mass is None:
        return "No training sequence has a share of the step's change: every weight or every product is 0."
    text = (
        f"By accounting shares, which add up, {counted(shares.lowering.count, 'training sequence')} lowered entropy (together "
        f"{signed(shares.lowering.sum)}) and {shares.raising.count} raised it ({signed(shares.raising.sum)}): in all "
        f"{signed(result.total)} {_UNIT} in this step, and {signed(result.horizon_total)} over all steps in which momentum still "
        f"holds this gradient; the {shares.all.top} largest of {shares.all.count} shares hold {shares.all.top_mass:.0%} of the "
        "sum of absolute shares"
    )
    if result.sum_of_effects is not None:
        text += (
            f"; the effects of leaving each out, which need not add up to it, sum to {signed(result.sum_of_effects)}"
        )
    side = result.evaluation
    if side is not None:
        text += f"; {side.lowering} of {counted(len(side.contribution), 'evaluation sequence')} lose entropy"
    return text + "."


def intervention_finding(result: InterventionResult) -> str:
    """Whether the shares say what happens when sequences are really left out."""
    score = result.scores[result.headline]
    text = f"Over {result.count} real steps with a random half of the training {result.by}s each"
    if score.spearman is None or score.interval is None:
        text += f", no rank correlation can be given: {score.reason}"
    else:
        low, high = score.interval
        text += (
            f", predicted and measured change of entropy have a rank correlation (linear datamodelling score) of "
            f"{score.spearman:.2f} [{low:.2f}, {high:.2f}]; the response over halves, measured on predicted, has slope "
            f"{with_ends(score.slope, score.slope_interval, plain)} and intercept "
            f"{with_ends(score.intercept, score.intercept_interval, signed)} {_UNIT}"
        )
    text += f"; the whole step makes {signed(result.full_step.measured)} {_UNIT}"
    for removal, word in ((result.removals.lowering, "lower"), (result.removals.raising, "raise")):
        if removal is not None:
            removed = counted(len(removal.sequences), "sequence")
            text += f", {signed(removal.measured)} without the {removed} said to {word} entropy most"
    if result.effective_part is not None and result.effective_part < 0.5:
        text += f"; of some of these steps {UNTRUSTED} (down to {result.effective_part:.0%})"
    return text + "."


def baselines_finding(result: BaselinesResult) -> str:
    """Which predictors the measured change cannot be distinguished from, and which have its sign."""
    if result.measured.value is None:
        return "No change of entropy was measured, so no predictor can be compared with it."
    text = f"The measured change was {result.measured.shown()} {_UNIT} ({BRACKETS})"
    if any(row.reason == UNTRUSTED for row in result.rows):
        return f"{text}; how near a predictor comes to it {UNTOLD}: {UNTRUSTED}."
    judged = [row for row in result.rows if row.z is not None and row.name != "fixed_prefix_on_given_tokens"]
    if judged:
        near, far = ([row for row in judged if row.agrees is within] for within in (True, False))
        text += f"; it and these predictions {ALIKE}: {_listed(near)}; it and these {DISAGREE}: {_listed(far)}"
    scaled = [row for row in result.rows if not row.comparable_in_scale and row.predicted is not None]
    right, wrong = ([row for row in scaled if row.sign_agrees is same] for same in (True, False))
    if right or wrong:
        text += f". Of those on another scale, these have its sign: {_listed(right)}; these the opposite sign: {_listed(wrong)}"
    elif scaled:
        text += ", too near to 0 for its sign to be compared"
    return text + "."


def _listed(rows: Sequence[BaselineRow]) -> str:
    return ", ".join(f"“{row.label}”" if "," in row.label else row.label for row in rows) or "none"


FINDINGS: dict[str, Callable[[Any], str]] = {
    "buffers": buffers_finding,
    "entropy_prediction": prediction_finding,
    "higher_order": higher_order_finding,
    "attribution": attribution_finding,
    "intervention": intervention_finding,
    "prompt_structure": structure_finding,
    "sequence_clustering": clustering_finding,
    "weighting_schemes": weighting_finding,
    "prices": price_finding,
    "baselines": baselines_finding,
}
"""Name of an analysis -> its sentence, from its record."""
