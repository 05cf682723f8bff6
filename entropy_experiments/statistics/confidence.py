"""Which words for which evidence: every claim that a command prints takes its words from here.

    evidence                                                     words
    a change whose 95% interval lies below 0, above it           fell, rose
    ... holds 0                                                  showed no clear change
    a difference whose interval holds 0                          cannot be distinguished
    ... and lies within CLOSE of what was measured               agree
    ... does not hold 0                                          do NOT agree
    an estimate whose interval holds 0                           is not significantly different from 0
    a correlation whose interval holds 0                         undetermined
    an order of numbers whose intervals overlap                  cannot be said
    a number without an error                                    no claim, the number alone
    a measurement of too small an effective sample               untrusted, the number alone

Numbers stand as ``value [low, high]``: the 95% interval, corrected for skew where an analysis has it
(entropy_experiments.statistics.jackknife_interval), else by Student's t on the degrees of freedom behind the error
(rl_training.intervals). docs/guides/reading-a-verdict.md is the same list for readers; a test holds both against each other, and
every other module against using these words by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from entropy_experiments.statistics.agreement import Agreement
from entropy_experiments.statistics.correlation import Correlation
from entropy_experiments.statistics.jackknife_interval import FEWEST_FOR_LEVEL, carried_by_few
from entropy_experiments.text.numbers import NOT_KNOWN, as_number, counted, plain, plus_minus, signed, with_interval

FELL, ROSE, NO_CHANGE = "fell", "rose", "showed no clear change"
AGREE, DISAGREE, ALIKE = "agree", "do NOT agree", "cannot be distinguished"
NOT_FROM_ZERO = "is not significantly different from 0"
UNTOLD = "cannot be said"
UNDETERMINED = "undetermined"
UNTRUSTED = "the measurement is not to be trusted, since its effective sample is less than half of the sequences"
DOUBTED = "untrusted"
DOUBTED_MEANS = (
    f"{DOUBTED.capitalize()}: the effective sample is less than half of the sequences, so that the error is not known."
)
BRACKETS = "brackets: 95% intervals"

CLOSE = 0.25
"""Part of the measured change that the whole interval of a difference may span to either side where two numbers "agree"; a gap
beyond it that is significant is a failure of the prediction, one within it a departure worth a look.
"""


Tone = Literal["plain", "good", "warning", "bad"]


@dataclass(frozen=True)
class Sentence:
    """One statement and how it is to be taken. The text is free of control characters, but is not escaped for markup.

    source: the files and fields of the results folder that its numbers come from, "" where it has none.
    lead: whether it belongs to what a reader sees first.
    """

    text: str
    tone: Tone = "plain"
    source: str = field(default="", compare=False)
    lead: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Known:
    """A number as sentences have it: its value and the ends of its 95% interval, None where it has no error."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def holds_zero(self) -> bool | None:
        """Whether the interval holds 0; None without one."""
        return None if self.low is None or self.high is None else self.low <= 0.0 <= self.high

    @property
    def smallest(self) -> float:
        """The least that |value| may be: 0 where the interval holds 0, and where there is none."""
        if self.low is None or self.high is None or self.low <= 0.0 <= self.high:
            return 0.0
        return min(abs(self.low), abs(self.high))

    @property
    def largest(self) -> float:
        """The most that |value| may be; without an interval nothing bounds it."""
        if self.low is None or self.high is None:
            return math.inf
        return max(abs(self.low), abs(self.high))

    def text(self, plus: bool = True) -> str:
        """``−0.27 [−0.39, −0.14]``."""
        return with_interval(self.value, self.low, self.high, plus)


def shown(number: Known | None, plus: bool = True) -> str:
    """The number in words, "not known" where there is none."""
    return NOT_KNOWN if number is None else number.text(plus)


def measured_cell(value: object, error: object, trusted: bool | None, plus: bool = True) -> str:
    """``−0.27 ± 0.03`` for a table; ``−0.27 (untrusted)`` of a measurement that is not to be trusted; its error says nothing."""
    if trusted is not False or as_number(value) is None:
        return plus_minus(value, error, plus)
    return f"{signed(value) if plus else plain(value)} ({DOUBTED})"


def few_prompts_sentence(prompts: int, freedoms: Mapping[str, float | None] | None = None) -> str | None:
    """What intervals are worth where few evaluation prompts are behind them; None where enough are.

    freedoms: what a number is called -> the degrees of freedom behind its error, None where unknown. Below FEWEST_FOR_LEVEL
    prompts all intervals are named (in the world of the tests 89 to 92% cover of 8 prompts, 86 to 98% of 4), else those that few
    prompts carry (`carried_by_few`).
    """
    if prompts <= 1:
        return None
    if prompts < FEWEST_FOR_LEVEL:
        return (
            f"Intervals rest on {counted(prompts, 'evaluation prompt')}: of so few, what is called 95% covers about 90%, "
            f"and less where rare completions carry the change; take at least {FEWEST_FOR_LEVEL}."
        )
    few = {name: f for name, f in (freedoms or {}).items() if f is not None and carried_by_few(f, prompts)}
    if not few:
        return None
    return (
        f"Few of the {prompts} evaluation prompts carry the error of the {' and the '.join(few)} change (worth "
        f"{min(few.values()):.0f} degrees of freedom of {prompts - 1}): other prompts may tell another number; take more."
    )


def change_word(change: Known) -> str:
    """What a quantity did: fell, rose, or showed no clear change. A change without an error is no evidence of either."""
    if change.holds_zero is not False:
        return NO_CHANGE
    return FELL if change.value < 0 else ROSE


def agreement_word(compared: Agreement, measured: float | None) -> str:
    """Of prediction and measurement: agree, cannot be distinguished, do NOT agree."""
    return gap_word(Known(compared.difference, compared.low, compared.high), measured)


def gap_word(gap: Known, measured: float | None) -> str:
    """The same by the difference of both, whose interval must be known."""
    if gap.holds_zero is False:
        return DISAGREE
    return AGREE if measured and gap.largest <= CLOSE * abs(measured) else ALIKE


def room_for_a_gap(compared: Agreement, measured: float) -> float:
    """The largest gap in the interval of the difference, as a part of what was measured."""
    return max(abs(compared.low), abs(compared.high)) / abs(measured)


def agreement_sentence(compared: Agreement, measured: float) -> str:
    """With the interval of the difference, and how large a gap it leaves room for."""
    gap = Known(compared.difference, compared.low, compared.high).text()
    word = agreement_word(compared, measured)
    if word == DISAGREE:
        size = f", {abs(compared.difference / measured):.0%} of the measured change" if measured else ""
        return f"They {word}: they differ by {gap}{size} (p = {plain(compared.p_value, 2)})."
    room = f", which leaves room for a gap of up to {room_for_a_gap(compared, measured):.0%}" if measured else ""
    return f"They {word}: they differ by {gap}{room}."


def agreement_tone(compared: Agreement, measured: float) -> Tone:
    """Good where they agree, bad for a gap beyond CLOSE, a warning for a smaller one; plain where they cannot be
    distinguished.
    """
    word = agreement_word(compared, measured)
    if word == DISAGREE:
        return "bad" if abs(compared.difference) > CLOSE * abs(measured) else "warning"
    return "good" if word == AGREE else "plain"


def correlation_words(found: Correlation | None, pairs: int) -> str:
    """A correlation with its interval, undetermined where that holds 0; below four pairs there is none. Steps count as
    independent in it, which the words say.
    """
    if found is None:
        return f"no correlation of {counted(pairs, 'step')}"
    text = with_interval(found.value, found.low, found.high, plus=False)
    word = f"{UNDETERMINED}, " if found.low <= 0.0 <= found.high else ""
    return f"correlation {word}{text}, steps taken as independent"
