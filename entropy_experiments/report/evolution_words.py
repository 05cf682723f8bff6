"""Sentences on a run's evolution that both its figures and the sweep's verdict say."""

from __future__ import annotations

from entropy_experiments.records.evolution import Evolution
from entropy_experiments.records.law_results import LawResult
from entropy_experiments.records.record import NotKnown
from entropy_experiments.statistics.confidence import NOT_FROM_ZERO
from entropy_experiments.text.numbers import counted, plain

_ALIKE = 0.3
"""Correlation of neighbouring steps above which it is said."""


def comparable_sentence(evolution: Evolution) -> str:
    """What comparisons between checkpoints rest on."""
    prompts, checkpoints = evolution.comparable, counted(len(evolution.checkpoints), "checkpoint")
    text = f"All {checkpoints} have the same {counted(prompts.prompts, 'evaluation prompt')}"
    if len(evolution.checkpoints) == 1:
        return f"{checkpoints} on {counted(prompts.prompts, 'evaluation prompt')}: what entropy did over the run needs two."
    if not prompts.same_everywhere:
        of = counted(prompts.of, "evaluation prompt")
        text = f"{prompts.prompts} of {of} are in every checkpoint; comparisons rest on these"
    return f"{text}; completions and training sequences are drawn anew at each, so that kernels are compared prompt by prompt."


def law_sentence(law: LawResult) -> str:
    """What R = -a e^H + b says of the run, and how its early forecast held."""
    fit, forecast = law.fit, law.forecast
    if isinstance(fit, NotKnown):
        return f"The law R = −a·e^H + b was not fitted: {fit.reason}."
    a, b, zero = (number.shown(plus=False) for number in (fit.a, fit.b, fit.at_zero_entropy))
    steps = counted(fit.n, "step")
    text = (
        f"Over {steps} R = −a·e^H + b fits with a = {a}, b = {b} (R² {plain(fit.r_squared, 2)}), "
        f"so that spending all entropy would end at a reward of {zero}"
    )
    slope = fit.a.known()
    if slope is None or slope.holds_zero is not False:
        text = f"Over {steps} R = −a·e^H + b has a = {a}, which {NOT_FROM_ZERO}: no trade of entropy for reward is seen"
    if fit.autocorrelation > _ALIKE:
        alike = plain(fit.autocorrelation, 2)
        text += f"; noise goes on from step to step (correlation {alike}), which the intervals allow for"
    if isinstance(forecast, NotKnown):
        return f"{text}. No forecast: {forecast.reason}."
    later = forecast.held_out
    better = later.root_mean_square_error < later.constant_root_mean_square_error
    inside = "inside" if later.mean_error_inside else "OUTSIDE"
    off, constant = plain(later.root_mean_square_error, 2), plain(later.constant_root_mean_square_error, 2)
    return (
        f"{text}. Its forecast from the first {forecast.n} steps: {later.inside:.0%} of the {later.n} later steps lie "
        f"in the {law.level:.0%} band, and their mean reward came {later.mean_error.shown()} from it, {inside} the "
        f"band of the mean; by root mean square it is {off} off, {'better' if better else 'no better'} than expecting no "
        f"change ({constant})."
    )
