"""The table that `analyze` and `sweep` end in: an outcome (see outcome.py) in a dozen lines, many in a row each.

On a terminal it is a rich table, cut to its width; elsewhere plain lines ``name: value``, one fact a line, which
a log can be searched for.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_experiments.records.comparison_record import ComparisonRecord, DifferenceRecord
from entropy_experiments.records.estimates import Estimate
from entropy_experiments.records.outcome_record import MeasuredOutcome, NoOutcome, Outcome
from entropy_experiments.statistics.confidence import (
    DOUBTED,
    DOUBTED_MEANS,
    NOT_FROM_ZERO,
    UNTRUSTED,
    Known,
    Sentence,
    agreement_tone,
    agreement_word,
    measured_cell,
)
from entropy_experiments.text.display import one_line
from entropy_experiments.text.numbers import plain, plus_minus, signed

_PARTS = {"batch": "this step's batch", "momentum": "momentum", "weight_decay": "weight decay"}
_STYLES = {"good": "green", "bad": "bold red", "warning": "yellow", "plain": ""}
_COLUMNS = ("entropy", "predicted", "measured", "apart", "batch", "momentum")
_TEXT_CHARACTERS = 200


def print_sentences(console: Console, sentences: Iterable[Sentence]) -> None:
    """Print sentences of a report as they are, in the colour of their tone."""
    for sentence in sentences:
        console.print(Text(f"- {sentence.text}", style=_STYLES[sentence.tone]), soft_wrap=not console.is_terminal)


def print_verdict(console: Console, outcome: Outcome) -> None:
    """Print what one analysis found: a table on a terminal, lines elsewhere."""
    facts = outcome_facts(outcome)
    console.print()
    if not console.is_terminal:
        for name, value, _ in facts:
            console.print(f"{name}: {value}", markup=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=_title(outcome), title_justify="left", pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value, tone in facts:
        table.add_row(Text(name), Text(value, style=_STYLES[tone]))
    console.print(table)


def print_outcomes(console: Console, outcomes: Sequence[Outcome | NoOutcome]) -> None:
    """Print one row an analysis: the checkpoints of a sweep, in the order given."""
    rows = [(outcome, _row(outcome)) for outcome in outcomes]
    columns = _columns_that_fit([row for _, row in rows], console.width if console.is_terminal else 0)
    console.print()
    if not columns:
        for outcome, row in rows:
            named = [f"{name} {value}" for name, value in row.items() if name not in ("step", "error")]
            named = [f"failed: {row['error']}"] if "error" in row else named
            console.print(f"step {row['step']}: {'; '.join(named)}", markup=False, soft_wrap=True)
            if isinstance(outcome, Outcome):
                console.print(f"  {one_line(outcome.folder, 1000)}", markup=False, soft_wrap=True)
        _say_doubted(console, [row for _, row in rows])
        return
    title = "Changes of entropy in nats per token, ± standard error"
    if "apart" in columns:
        title += "; apart: predicted less measured, in standard errors of the difference"
    table = Table(box=box.SIMPLE_HEAD, title=title, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for name in columns:
        table.add_column(name, justify="left" if name == "checks" else "right", no_wrap=True)
    for outcome, row in rows:
        failed = isinstance(outcome, NoOutcome) or outcome.checks.failed
        cells = row | ({"checks": "failed"} if "error" in row else {})
        table.add_row(*(cells.get(name, "") for name in columns), style=_STYLES["bad"] if failed else "")
    console.print(table)
    _say_doubted(console, [row for _, row in rows])
    for _, row in rows:
        if "error" in row:
            console.print(Text(f"step {row['step']} failed: {row['error']}", style=_STYLES["bad"]))


def _say_doubted(console: Console, rows: Sequence[Mapping[str, str]]) -> None:
    """What "untrusted" is, below rows that say so."""
    if any(f"({DOUBTED})" in row.get("measured", "") for row in rows):
        console.print(DOUBTED_MEANS, markup=False, soft_wrap=not console.is_terminal)


def _columns_that_fit(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The columns of a table at most `width` wide, the least important left out first; none where too few fit."""
    columns = ["step", *_COLUMNS, "checks"]
    needed = {name: max([len(name), *(len(row.get(name, "")) for row in rows)]) + 3 for name in columns}
    for dropped in ("momentum", "batch", "apart", "entropy"):
        if sum(needed[name] for name in columns) <= width:
            return columns
        columns.remove(dropped)
    return columns if sum(needed[name] for name in columns) <= width else []


def outcome_facts(outcome: Outcome) -> list[tuple[str, str, str]]:
    """(name, value, tone) of every line of the closing table; units are in the values, brackets hold 95% intervals."""
    unit, noise = outcome.unit, outcome.training_noise
    facts = [("Entropy before the step", f"{outcome.entropy.shown(plus=False)} {unit}", "plain")]
    if outcome.predicted.value is not None:
        facts.append(("Predicted change", f"{outcome.predicted.shown()} {unit}", "plain"))
        parts = ((name, getattr(outcome.parts, part)) for part, name in _PARTS.items())
        facts += [(f"  from {name}", number.shown(), "plain") for name, number in parts if number.value is not None]
    if outcome.measured.value is not None:
        facts.append(_measured(outcome, outcome.measured.value))
    if noise is not None:
        text = f"±{plain(noise.standard_error, 2)} {unit} (standard error), on top of the errors above; 95% interval of the "
        text += f"predicted change: {signed(noise.low, 2)} to {signed(noise.high, 2)}"
        facts.append(("Another training buffer", text, "plain"))
    same = _same_prompt(outcome)
    if same:
        facts.append(("Same-prompt effect", same, "plain"))
    facts.append(_checks(outcome))
    for name, what in outcome.failed_analyses.items():
        facts.append((f"FAILED: {one_line(name, 60).replace('_', ' ')}", one_line(what, _TEXT_CHARACTERS), "bad"))
    facts.append(("Folder", one_line(outcome.folder, 1000), "plain"))
    return facts


def _measured(outcome: Outcome, measured: float) -> tuple[str, str, str]:
    value = f"{outcome.measured.shown()} {outcome.unit}"
    compared = None if outcome.agreement is None else outcome.agreement.known()
    if outcome.measured.trustworthy is False:
        return "Measured change", f"{value}; {UNTRUSTED}", "warning"
    if compared is None:
        return "Measured change", value, "plain"
    gap = Known(compared.difference, compared.low, compared.high).text()
    text = f"{value}; it and the prediction {agreement_word(compared, measured)}, the difference is {gap}"
    return "Measured change", text, agreement_tone(compared, measured)


def _same_prompt(outcome: Outcome) -> str:
    same = outcome.same_prompt
    if same.cosine is None or same.cosine_other_prompts is None:
        return ""
    text = f"mean cosine of gradients {signed(same.cosine, 2)} between sequences of one prompt, "
    text += f"{signed(same.cosine_other_prompts, 2)} of two"
    text = text if same.p_value is None else f"{text} (p = {plain(same.p_value, 2)})"
    return f"{text}; raw K₁ differs the other way, so nothing follows" if same.signs_agree is False else text


def _checks(outcome: Outcome) -> tuple[str, str, str]:
    passed, failed = outcome.checks.passed, outcome.checks.failed
    text = f"{passed} of {passed + len(failed)} passed"
    if not passed + len(failed):
        return "Self-checks", "none recorded", "warning"
    if failed:
        text += f"; FAILED: {', '.join(one_line(name, 80) for name in failed)}"
    return "Self-checks", text, "bad" if failed else "good"


def _title(outcome: Outcome) -> Text:
    checkpoint = outcome.checkpoint
    return Text(f"Verdict on checkpoint {checkpoint.step} of {one_line(checkpoint.model, 60)}", style="bold")


def _row(outcome: Outcome | NoOutcome) -> dict[str, str]:
    row = {"step": str(outcome.checkpoint.step)}
    if isinstance(outcome, NoOutcome):
        return row | {"error": one_line(outcome.error, _TEXT_CHARACTERS)}
    failed = len(outcome.checks.failed) + len(outcome.failed_analyses)
    compared = outcome.agreement
    return row | {
        "entropy": _amount(outcome.entropy, plus=False),
        "predicted": _amount(outcome.predicted),
        "measured": _measured_amount(outcome.measured),
        "apart": "–" if compared is None else f"{compared.z:.1f} SE",
        "batch": _amount(outcome.parts.batch),
        "momentum": _amount(outcome.parts.momentum),
        "checks": f"{outcome.checks.passed} passed" + (f", {failed} FAILED" if failed else ""),
    }


def _measured_amount(measured: MeasuredOutcome) -> str:
    return measured_cell(measured.value, measured.standard_error, measured.trustworthy)


def _amount(number: Estimate, plus: bool = True) -> str:
    return plus_minus(number.value, number.standard_error, plus=plus)


def print_comparison(console: Console, comparison: ComparisonRecord) -> None:
    """Print what `compare` found: its first sentence, warnings, then each difference from A."""
    console.print()
    for side in comparison.sides:
        console.print(f"{side.letter}: {one_line(side.folder, 1000)}", markup=False, soft_wrap=True)
    first, *others = comparison.verdict
    print_sentences(console, [first, *(sentence for sentence in others if sentence.tone in ("bad", "warning"))])
    rows = [
        (row.label, letter, gap.shown(), row.unit, _certainty(gap))
        for row in comparison.quantities
        for letter, gap in row.minus_a.items()
    ]
    unpaired = _unpaired(comparison)
    if not console.is_terminal:
        for label, letter, gap, unit, how in rows:
            console.print(f"{label}, {letter} minus A: {gap} {unit}, {how}", markup=False, soft_wrap=True)
        for line in unpaired:
            console.print(line, markup=False, soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("Quantity", "left"), ("minus A", "right"), ("Unit", "left"), ("", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for label, letter, gap, unit, how in rows:
        table.add_row(Text(label), Text(f"{letter} {gap}"), Text(unit), Text(how.removeprefix("which ")))
    console.print(table)
    for line in unpaired:
        console.print(Text(line))


def _unpaired(comparison: ComparisonRecord) -> list[str]:
    """Once for all rows: which differences are not paired over evaluation prompts, and why."""
    rows: dict[tuple[str, str], list[str]] = {}
    gaps = [(row.label, letter, gap) for row in comparison.quantities for letter, gap in row.minus_a.items()]
    for label, letter, gap in gaps:
        if not gap.paired_prompts:
            rows.setdefault((letter, gap.why_unpaired or "no evaluation prompts behind it"), []).append(label)
    found = []
    for (letter, why), labels in rows.items():
        every = len(labels) == sum(letter == other for _, other, _ in gaps)
        which = "all" if every else "; ".join(labels)
        found.append(f"Unpaired, {letter} minus A ({which}): {why}; errors of both sides are added as if independent.")
    return found


def _certainty(gap: DifferenceRecord) -> str:
    paired = f" (paired over {gap.paired_prompts} prompts)" if gap.paired_prompts else ""
    if gap.value == 0.0 and not gap.standard_error:
        return f"the same number{paired}"
    words = {True: "0 outside its interval", False: f"which {NOT_FROM_ZERO}", None: "no interval"}[
        gap.differs_from_zero
    ]
    return f"{words}{paired}"
