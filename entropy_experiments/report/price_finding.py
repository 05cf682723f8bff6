"""What keeps entropy at the least cost in reward, in one sentence: no more than the paired intervals show."""

from __future__ import annotations

from entropy_experiments.records.price_results import PriceRow, PricesResult
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, NOT_FROM_ZERO, UNTOLD, Sentence
from entropy_experiments.text.numbers import counted

NEXT = "What to do next: "
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
    text += f". To keep at least {result.keeps:.0%} of that, “{best.label}” has the best price: {price}"
    known = best.reward_per_nat.known()
    if known is not None and known.holds_zero:
        text += f", which {NOT_FROM_ZERO}"
    if not others:
        return f"{text}."
    named = ", ".join(f"“{row.label}”" for row in others[:_NAMED])
    more = f" and {counted(len(others) - _NAMED, 'other')}" if len(others) > _NAMED else ""
    return f"{text}; it and {named}{more} {ALIKE} by price."


def next_step_sentence(result: PricesResult) -> Sentence | None:
    """What to do next, for the head of a report; None where no loss of entropy is shown that could be kept.

    Shorter than `price_finding`, which stands in the section, and no more certain.
    """
    rows = {row.name: row for row in result.rows}
    run = rows["run"].entropy
    lost = None if run is None else run.known()
    if lost is None or lost.value >= 0 or lost.holds_zero is not False:
        return None
    share = f"at least {result.keeps:.0%} of the entropy that this step loses"
    if result.reward_note is not None:
        kept = _most(result)
        most = "no intervention is predicted to help" if kept is None else f"{kept.label} is predicted to keep most"
        return Sentence(f"{NEXT}to keep entropy, {most}; what it costs in reward {UNTOLD}.")
    if not result.alike:
        return Sentence(f"{NEXT}no intervention of the price list is predicted to keep {share}.")
    best, *others = (rows[name] for name in result.alike)
    assert best.reward_per_nat is not None
    text = (
        f"{NEXT}to keep {share}, “{best.label}” costs least reward here: {best.reward_per_nat.shown()} for a nat kept"
    )
    known = best.reward_per_nat.known()
    if known is not None and known.holds_zero:
        text += f", which {NOT_FROM_ZERO}"
    if others:
        named = [f"“{row.label}”" for row in others[:_NAMED]]
        if len(others) > _NAMED:
            named.append(counted(len(others) - _NAMED, "other"))
        text += f"; {_listed(named)} {ALIKE} from it by price"
    return Sentence(f"{text}.")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _most(result: PricesResult) -> PriceRow | None:
    """Of those whose interval says that they keep entropy, the one that keeps most."""
    kept = [
        (row, found) for row in result.rows if (found := row.entropy_minus_run) is not None and (found.low or 0) > 0
    ]
    return max(kept, key=lambda pair: pair[1].value or 0.0)[0] if kept else None


def _kept(row: PriceRow) -> str:
    return "" if row.entropy_minus_run is None else f"{row.entropy_minus_run.shown()} nats per token more"
