"""What is said of a price list: no more than its intervals show."""

from __future__ import annotations

from typing import Any

from entropy_experiments.analyses.prices import KEEPS
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.price_results import PriceRow, PricesResult
from entropy_experiments.report.price_finding import next_step_sentence, price_finding


def estimate(value: float, error: float) -> StudentEstimate:
    return StudentEstimate(
        value=value, standard_error=error, degrees_of_freedom=20.0, low=value - 2 * error, high=value + 2 * error
    )


def of_prices(
    run: float, *prices: tuple[str, float], alike: tuple[str, ...] = (), note: str | None = None
) -> PricesResult:
    rows = [PriceRow(name="run", label="as trained", entropy=estimate(run, 0.01))]
    rows += [
        PriceRow(
            name=name,
            label=f"the {name}",
            entropy=estimate(run + 0.05, 0.01),
            entropy_minus_run=estimate(0.05, 0.01),
            reward_per_nat=estimate(price, 0.1),
        )
        for name, price in prices
    ]
    return PricesResult(
        rows=tuple(rows), alike=alike, keeps=KEEPS, reward_note=note, n_eval=8, eval_prompts=8, judged_prompts=4
    )


def spoken(*args: Any, **kwargs: Any) -> str:
    return price_finding(of_prices(*args, **kwargs))


def next_step(*args: Any, **kwargs: Any) -> str | None:
    found = next_step_sentence(of_prices(*args, **kwargs))
    return None if found is None else found.text


def test_the_sentence_says_no_more_than_the_intervals():
    assert "no loss is shown" in spoken(0.1) and "no loss is shown" in spoken(-0.01)
    assert "no intervention is predicted to keep 25%" in spoken(-0.1)
    text = spoken(-0.1, ("first", -0.5), ("second", -0.6), alike=("first", "second"))
    assert (
        "“the first” has the best price: reward changes by −0.5" in text
        and "“the second” cannot be distinguished" in text
    )
    assert "is not significantly different from 0" in spoken(-0.1, ("first", 0.1), alike=("first",))
    assert "cannot be said: no rewards" in spoken(-0.1, ("first", 0.1), note="no rewards")


def test_the_head_of_the_report_says_what_to_do_next():
    assert next_step(0.1) is None and next_step(-0.01) is None, "nothing is lost, so nothing is to be kept"
    assert "no intervention of the price list is predicted to keep at least 25%" in str(next_step(-0.1))
    priced = [("first", -0.5), ("second", -0.6), ("third", -0.7)]
    text = next_step(-0.1, *priced, alike=("first", "second", "third"))
    assert text == (
        "What to do next: to keep at least 25% of the entropy that this step loses, “the first” costs least reward here: "
        "−0.50 [−0.70, −0.30] for a nat kept; “the second” and “the third” cannot be distinguished from it by price."
    )
    assert next_step(-0.1, *priced, alike=("first",)) == f"{str(text).split(';')[0]}."
    many = [(str(n), -0.5) for n in range(9)]
    assert "“the 4” and 4 others cannot" in str(next_step(-0.1, *many, alike=tuple(name for name, _ in many)))
    unknown = str(next_step(-0.1, ("first", 0.1), note="no rewards"))
    assert "the first is predicted to keep most; what it costs in reward cannot be said" in unknown
