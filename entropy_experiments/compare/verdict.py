"""What a comparison found, in plain sentences, the most important first.

A difference counts as one where 0 lies outside its 95% interval; otherwise it "is not significantly different from 0", which is
not the same as none.
"""

from __future__ import annotations

from collections.abc import Sequence

from entropy_experiments.compare.differences import Compared, Difference, Point
from entropy_experiments.compare.sides import Side
from entropy_experiments.records.training_course import entropy_column, entropy_course_words
from entropy_experiments.report.verdict import PARTS, with_source
from entropy_experiments.statistics.confidence import ALIKE, BRACKETS, NOT_FROM_ZERO, UNTOLD, Sentence
from entropy_experiments.text.display import one_line
from entropy_experiments.text.numbers import counted, plain

_UNIT = "nats per token"


def comparison_verdict(sides: Sequence[Side], points: Sequence[Point], caveats: Sequence[str]) -> list[Sentence]:
    """The sentences; `points` as `compare_sides` gives them, the last of which is the one that is told in detail."""
    checks = with_source("each side's run.json: self_checks", _failed_checks(sides))
    texts = [*(text for side in sides for text in side.missing), *caveats]
    warnings = with_source(
        "each side's run.json and summary.json", [Sentence(text, "warning") for text in texts], len(texts)
    )
    if not points:
        alone = "The sweeps share no training step, so only their courses can be compared."
        return [*checks, Sentence(alone, "warning", "each side's sweep.json: checkpoints", lead=True), *warnings]
    point, found = points[-1], []
    alone = sides[0].kind == "analysis"
    first = "" if alone else f"At step {plain(point.step)}, the last that all have: "
    at = "" if alone else f"At step {plain(point.step)}: "
    for place, side in enumerate(sides[1:], start=1):
        step = _step_sentence(point, place, side.letter, first)
        level = _level_sentence(point, place, side.letter, at)
        part = _part_sentence(point, place, side.letter, at)
        reward = _reward_sentence(point, place, side.letter, at)
        found += with_source("comparison.parquet: measured_change, predicted_change", [step], 1)
        found += with_source("comparison.parquet: entropy", [level], 1)
        found += with_source("comparison.parquet: predicted_change", [part], 1)
        found += with_source("comparison.parquet: reward", [reward])
        found += with_source("comparison.parquet: entropy", [_course_sentence(points, place, side.letter)])
    found += with_source("each side's training_history.json", [_training_sentence(sides, point)])
    found += with_source("comparison.parquet: standard_error, paired_prompts", [_error_sentence(point, sides)])
    return [*checks, *found, *warnings]


def _step_sentence(point: Point, place: int, letter: str, at: str) -> Sentence:
    """Who loses more entropy in the analysed step, as measured, or as predicted where nothing was measured."""
    for name, word in (("measured", "measured"), ("predicted", "predicted")):
        row = point.row(name)
        difference = row.differences[place] if row else None
        if row is None or difference is None:
            continue
        a, b = row.numbers[0], row.numbers[place]
        assert a is not None and a.value is not None and b is not None and b.value is not None
        beside = f"({word}: {letter} {row.text(place)}, A {row.text(0)}; {_how(difference)}; {BRACKETS})"
        size = _size(difference)
        if difference.is_nothing:
            return Sentence(f"{at}In the analysed step {letter} and A change entropy by the same amount {beside}.")
        if difference.differs_from_zero is None:
            text = f"In the analysed step {letter}'s change of entropy differs from A's by {size} {_UNIT}"
            return Sentence(f"{at}{text}; whether that is more than chance {UNTOLD} {beside}.", "warning")
        if not difference.differs_from_zero:
            gap = difference.number.shown()
            text = (
                f"In the analysed step {letter}'s change of entropy minus A's is {gap} {_UNIT}, which {NOT_FROM_ZERO}"
            )
            return Sentence(f"{at}{text} {beside}.")
        return Sentence(f"{at}{_in_words(letter, a.value, b.value, size)} in the analysed step {beside}.")
    return Sentence(
        f"{at}Changes of entropy cannot be compared: not both A and {letter} have an analysed step.", "warning"
    )


def _size(difference: Difference) -> str:
    """How far apart, with the interval of that."""
    return difference.number.model_copy(update={"value": abs(difference.value)}).shown(plus=False)


def _in_words(letter: str, a: float, b: float, size: str) -> str:
    if a <= 0 and b <= 0:
        return f"{letter} loses {size} {_UNIT} {'less' if b > a else 'more'} than A"
    if a >= 0 and b >= 0:
        return f"{letter} gains {size} {_UNIT} {'more' if b > a else 'less'} than A"
    one, other = ("gains", "loses") if b > a else ("loses", "gains")
    return f"{letter} {one} entropy and A {other} it, {size} {_UNIT} apart,"


def _level_sentence(point: Point, place: int, letter: str, at: str) -> Sentence | None:
    row = point.row("entropy")
    difference = row.differences[place] if row else None
    if row is None or difference is None:
        return None
    levels = f"({letter} {row.text(place, plus=False)}, A {row.text(0, plus=False)}; {BRACKETS})"
    if difference.is_nothing:
        return Sentence(f"{at}Before the step the policies of {letter} and A have the same entropy {levels}.")
    if difference.differs_from_zero is not True:
        gap = difference.number.shown()
        text = f"Before the step the entropies of {letter}'s and A's policies {ALIKE}, {letter} minus A is {gap}"
        return Sentence(f"{at}{text} {_UNIT} {levels}.")
    more = "more" if difference.value > 0 else "less"
    text = f"Before the step {letter}'s policy has {_size(difference)} {_UNIT} {more} entropy than A's {levels}"
    return Sentence(f"{at}{text}.")


def _part_sentence(point: Point, place: int, letter: str, at: str) -> Sentence | None:
    """How much of the difference was predicted, and by which part of the step."""
    row = point.row("predicted")
    difference = row.differences[place] if row else None
    if row is None or difference is None:
        return None
    gap = difference.number.shown()
    text = f"The first-order prediction puts the difference {letter} minus A at {gap} {_UNIT}"
    parts = [(name, _difference(point.row(part), place)) for part, name in PARTS.items()]
    listed = [f"{name} {d.number.shown()}" for name, d in parts if d is not None and d.value]
    doubt = "" if difference.differs_from_zero else f", which {NOT_FROM_ZERO}"
    return Sentence(f"{at}{text}{doubt}{': ' if listed else ''}{', '.join(listed)} ({BRACKETS}).")


def _difference(row: Compared | None, place: int) -> Difference | None:
    return None if row is None else row.differences[place]


def _reward_sentence(point: Point, place: int, letter: str, at: str) -> Sentence | None:
    row = point.row("reward")
    difference = row.differences[place] if row else None
    if row is None or difference is None:
        return None
    if difference.is_nothing:
        return Sentence(f"{at}Mean reward on the evaluation prompts is the same for {letter} and A.")
    doubt = "" if difference.differs_from_zero else f", which {NOT_FROM_ZERO}"
    rewards = f"({letter} {row.text(place, plus=False)}, A {row.text(0, plus=False)}; {BRACKETS})"
    gap = difference.number.shown()
    return Sentence(f"{at}Mean reward on the evaluation prompts, {letter} minus A: {gap}{doubt} {rewards}.")


def _course_sentence(points: Sequence[Point], place: int, letter: str) -> Sentence | None:
    """Over several steps: where entropy differs beyond chance."""
    known = [_difference(point.row("entropy"), place) for point in points]
    known = [
        difference for difference in known if difference is not None and difference.number.standard_error is not None
    ]
    if len(points) < 2 or not known:
        return None
    more = sum(bool(d.differs_from_zero) and d.value > 0 for d in known)
    less = sum(bool(d.differs_from_zero) and d.value < 0 for d in known)
    return Sentence(
        f"Of {counted(len(known), 'shared checkpoint')}, {letter} has more entropy than A at {more} and less at {less}, "
        f"each with 0 outside its 95% interval; at {len(known) - more - less} they {ALIKE}. One in twenty such intervals would "
        "miss by chance."
    )


def _training_sentence(sides: Sequence[Side], point: Point) -> Sentence | None:
    """What entropy did in training on each side, up to the analysed checkpoint."""
    told = [
        f"entropy of {side.letter} {entropy_course_words(analysis.history)[0]}"
        for side, analysis in zip(sides, point.analyses, strict=True)
        if len(entropy_column(analysis.history).steps)
    ]
    if not told:
        return None
    text = f"In training {'; '.join(told)}"
    return Sentence(f"{text}. These are single runs: how much another seed would change them is not known.")


def _failed_checks(sides: Sequence[Side]) -> list[Sentence]:
    found = []
    for side in sides:
        for results in side.points:
            checks = results.run.self_checks
            failed = [one_line(check.name, 80) for check in checks if not check.passed]
            step = results.summary.checkpoint.step
            where = side.letter if side.kind == "analysis" else f"{side.letter} at step {plain(step)}"
            if failed:
                found.append(
                    Sentence(
                        f"{where}: {len(failed)} of {counted(len(checks), 'self-check')} FAILED ({', '.join(failed)}): do not "
                        "rely on its numbers until this is explained.",
                        "bad",
                    )
                )
            elif not checks:
                found.append(
                    Sentence(f"{where}: no self-checks were recorded, so its numbers have not been checked.", "warning")
                )
    return found


def _error_sentence(point: Point, sides: Sequence[Side]) -> Sentence:
    """How the standard errors were made, and what they leave out."""
    ways = []
    for place, side in enumerate(sides[1:], start=1):
        known = [row.differences[place] for row in point.rows]
        paired = [d.prompts for d in known if d is not None and d.prompts]
        reasons = dict.fromkeys(d.reason for d in known if d is not None and not d.prompts)
        if paired:
            ways.append(f"{side.letter} is paired with A over {counted(max(paired), 'shared evaluation prompt')}")
        if reasons:
            some = "some numbers of " if paired else ""
            ways.append(f"{some}{side.letter} compared as if independent of A ({'; '.join(reasons)})")
    text = f"Standard errors: {', '.join(ways)}. " if ways else ""
    return Sentence(
        f"{text}They cover the choice of evaluation prompts and completions, not that of the training buffer, nor a seed of "
        "training."
    )


def _how(difference: Difference) -> str:
    if difference.prompts:
        return f"paired over {counted(difference.prompts, 'shared evaluation prompt')}"
    return f"unpaired, {difference.reason}" if difference.reason else "unpaired"
