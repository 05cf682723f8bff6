"""What keeps entropy at the least cost in reward, in one sentence: no more than the paired intervals show."""

from __future__ import annotations

from entropy_experiments.records.price_results import PriceRow, PricesResult
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, NOT_FROM_ZERO, UNTOLD
from entropy_experiments.text.numbers import counted

_NAMED = 4
_AS_TRAINED = "The step as trained is predicted to change entropy by"


def price_finding(result: PricesResult) -> str:
    """The best price and what cannot be distinguished from it; or why there is none."""
    rows = {row.name: row for row in result.rows}
    run = rows["run"].entropy
    assert run is not None
    lost = run.known()
    if lost is None or lost.value >= 0 or lost.holds_zero is not False:
        return f"{_AS_TRAINED} {run.shown()} nats per token ({BRACKETS}): no loss is shown that could be kept."
    text = f"{_AS_TRAINED} {run.shown()} nats per token"
    if result.reward_note is not None:
        kept = _most(result)
        best = "" if kept is None else f"; {kept.label} keeps most, {_kept(kept)}"
        return f"{text} ({BRACKETS}){best}. What that costs in reward {UNTOLD}: {result.reward_note}."
    if not result.alike:
        return f"{text} ({BRACKETS}); no intervention is predicted to keep {result.keeps:.0%} of it."
    best, *others = (rows[name] for name in result.alike)
    assert best.reward_per_nat is not None
    price = f"reward changes by {best.reward_per_nat.shown()} for a nat kept ({BRACKETS})"
    text += f". To keep at least {result.keeps:.0%} of that, {best.label} has the best price: {price}"
    known = best.reward_per_nat.known()
    if known is not None and known.holds_zero:
        text += f", which {NOT_FROM_ZERO}"
    if not others:
        return f"{text}."
    named = ", ".join(row.label for row in others[:_NAMED])
    more = f" and {counted(len(others) - _NAMED, 'other')}" if len(others) > _NAMED else ""
    return f"{text}; it and {named}{more} {ALIKE} by it."


def _most(result: PricesResult) -> PriceRow | None:
    """Of those whose interval says that they keep entropy, the one that keeps most."""
    kept = [
        (row, found) for row in result.rows if (found := row.entropy_minus_run) is not None and (found.low or 0) > 0
    ]
    return max(kept, key=lambda pair: pair[1].value or 0.0)[0] if kept else None


def _kept(row: PriceRow) -> str:
    return "" if row.entropy_minus_run is None else f"{row.entropy_minus_run.shown()} nats per token more"
