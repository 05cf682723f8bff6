"""The verdict's sentences on training sequences: who moved entropy most, by which number and how surely, and what another draw
of the training buffer would have changed.

Three numbers go by three names: the *accounting share* (P and clip held, adds up to the batch part), the *effect of leaving out*
(P and clip answer, does not add up) and the *response over halves* (analyses/intervention.py, by real steps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_experiments.records.leaving_out import FirstUnit, LeavingOut, WhoWasFirst
from entropy_experiments.records.summary import Summary
from entropy_experiments.statistics.confidence import Sentence, Tone
from entropy_experiments.text.display import PromptFrame, prompt_frame, quoted
from entropy_experiments.text.numbers import as_number, counted, plain, signed, with_interval

_UNIT = "nats per token"
_MOST_NAMED = 8
_SAME = (0.5, 2.0)  # slopes of real on first-order effects within which the one stands for the other


def cost_sentences(
    training: Sequence[Mapping[str, Any]], all_prompts: Sequence[str], leaving_out: LeavingOut | None
) -> list[Sentence]:
    """Which training sequence and which prompt cost most entropy in this step, or between which the data do not decide.

    Args:
        training: rows with "row", "prompt_index", "prompt", "completion", "reward", "delta_h" and "effect_of_leaving_out".
        all_prompts: what they have in common is left out of what is quoted.
        leaving_out: by which number the first is named and how surely; without it shares decide, how surely is not known.
    """
    rows = [row for row in training if as_number(row["delta_h"]) is not None]
    if not rows:
        return [Sentence("What single sequences cost is not known: no shares of the change were stored.", "warning")]
    by_effect = leaving_out is not None and leaving_out.headline == "effect"
    key = "effect_of_leaving_out" if by_effect else "delta_h"
    lowering, raising = sum(row[key] < 0 for row in rows), sum(row[key] > 0 for row in rows)
    name = "effects of leaving them out" if by_effect else "accounting shares"
    text = (
        f"Of {counted(len(rows), 'training sequence')}, {lowering} lowered entropy in this step and {raising} raised it"
        f"{_told(rows, 'effect' if by_effect else 'delta_h')}"
    )
    text += f" (by their {name}"
    own = 0.0 if leaving_out is None else leaving_out.own_part_of_second_moment
    if own >= 1:
        text += (
            "; at the optimizer's first step its sign alone counts, and no share says what leaving a sequence out does"
        )
    elif by_effect:
        text += f"; shares mislead here, since {own:.0%} of Adam's second moment is this step's own gradient"
    text += ")"
    if not lowering:
        return [Sentence(f"{text}; none cost entropy.")]
    teller = _Teller(rows, key, by_effect, leaving_out, list(all_prompts))
    found = [Sentence(f"{text}; {teller.sequence()}.", teller.tone)]
    if len({row["prompt_index"] for row in rows}) > 1 and (of_prompts := teller.prompt()) is not None:
        slope = None if leaving_out is None else leaving_out.slope_of_real
        tone: Tone = teller.tone
        if by_effect and slope is not None and not _SAME[0] <= slope <= _SAME[1]:
            of_prompts += f"; steps without whole prompts follow these effects with a slope of {plain(slope, 2)} only"
            tone = "warning"
        found.append(Sentence(f"{of_prompts}.", tone))
    return found


def _told(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Of how many rows the sign is told: the columns `name`_low and `name`_high; nothing where they are not known."""
    ends = [(as_number(row.get(f"{name}_low")), as_number(row.get(f"{name}_high"))) for row in rows]
    known = [(low, high) for low, high in ends if low is not None and high is not None]
    if not known:
        return ""
    return f", with zero outside the 95% interval for {sum(e < 0 for _, e in known)} and {sum(b > 0 for b, _ in known)} of them"


class _Teller:
    """Sentences on the first sequence and the first prompt."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        key: str,
        by_effect: bool,
        leaving_out: LeavingOut | None,
        all_prompts: list[str],
    ) -> None:
        first = None if leaving_out is None else leaving_out.first
        self._rows, self._key, self._by_effect = rows, key, by_effect
        self._first = first if isinstance(first, WhoWasFirst) else None
        self._why = None if first is None or isinstance(first, WhoWasFirst) else first.reason
        self._frame: PromptFrame = prompt_frame(all_prompts or [row["prompt"] for row in rows])
        self._by_row = {row["row"]: row for row in rows}
        self.tone: Tone = "plain"

    def sequence(self) -> str:
        """The end of the first sentence."""
        kind = "effect of leaving it out: entropy with it minus without it" if self._by_effect else "accounting share"
        found = None if self._first is None else self._first.sequences.lowering
        worst = min(self._rows, key=lambda row: row[self._key])
        if found is not None and not _named(found):
            return self._undecided(found, "sequence")
        members = [worst] if found is None else [self._by_row[i] for i in found.rows]
        value, one = sum(row[self._key] for row in members), members[0]
        number = _thousandths(value) if found is None else _thousandths(value, found.low, found.high)
        who = f"sequence {one['row']} of prompt {one['prompt_index']}"
        if len(members) > 1:
            who = f"sequence {one['row']} of prompt {one['prompt_index']} with its {len(members) - 1} equal ones"
        return (
            f"the one that cost most is {who} (reward {plain(one.get('reward'))}): {number} ({kind}; "
            f"{self._how_surely(found)}), {quoted(self._frame.own_part(one['prompt']), keep='end')} answered by "
            f"{quoted(one['completion'])}"
        )

    def prompt(self) -> str | None:
        """On prompts, None where none cost entropy."""
        sums: dict[int, float] = {}
        for row in self._rows:
            sums[row["prompt_index"]] = sums.get(row["prompt_index"], 0.0) + row[self._key]
        found = None if self._first is None else self._first.prompts.lowering
        if found is not None and not _named(found):
            return f"Of {counted(len(sums), 'prompt')}, {self._undecided(found, 'prompt')}"
        if found is None and min(sums.values()) >= 0:
            return None
        if found is None:
            prompt = min(sums, key=lambda index: sums[index])
            number = _thousandths(sums[prompt])
        else:
            prompt, number = (
                self._by_row[found.rows[0]]["prompt_index"],
                _thousandths(found.value, found.low, found.high),
            )
        example = next(row for row in self._rows if row["prompt_index"] == prompt)
        together = "effect of leaving all its sequences out" if self._by_effect else "accounting share of its sequences"
        return (
            f"Of {counted(len(sums), 'prompt')}, prompt {prompt} cost most: {number} ({together}; "
            f"{self._how_surely(found)}): {quoted(self._frame.own_part(example['prompt']), keep='end')}"
        )

    def _how_surely(self, found: FirstUnit | None) -> str:
        if found is None:
            self.tone = "warning"
            return "how surely is not known" + ("" if self._why is None else f": {self._why}")
        return f"first in {found.first_in:.0%} of {self._bootstraps}"

    @property
    def _bootstraps(self) -> str:
        return f"{0 if self._first is None else self._first.bootstraps} bootstraps over evaluation prompts"

    def _undecided(self, found: FirstUnit, what: str) -> str:
        members = [self._by_row[rows[0]] for rows in found.set.rows]
        prompts = sorted({row["prompt_index"] for row in members})
        if what == "prompt":
            who = f"prompts {_listed(prompts)}" if len(prompts) <= _MOST_NAMED else f"{len(prompts)} prompts"
        elif len(prompts) == 1:
            who = f"the {len(members)} sequences {_listed([row['row'] for row in members])} of prompt {prompts[0]}"
        elif len(members) <= _MOST_NAMED:
            who = f"the {len(members)} sequences {_listed([row['row'] for row in members])}"
        else:
            who = f"{len(members)} sequences of {counted(len(prompts), 'prompt')}"
        kind = "effects of leaving them out" if self._by_effect else "accounting shares"
        together = _thousandths(found.set.value, found.set.low, found.set.high)
        return (
            f"no single {what} cost most: none is first in more than half of {self._bootstraps}, and in "
            f"{found.set.first_in:.0%} it is one of {who}, together {together} ({kind})"
        )


def training_noise_sentence(summary: Summary) -> Sentence | None:
    """What another draw of the training buffer would have changed, and what that error covers; None without a step."""
    noise = summary.training_noise
    if noise is None or noise.standard_error is None or noise.low is None or noise.high is None:
        if summary.leaving_out is None:
            return None
        return Sentence(
            "How far another draw of the training buffer would have moved the predicted change is not known (one prompt, or "
            "sequences of one's own): errors given here are over evaluation prompts alone.",
            "warning",
        )
    units = f"{noise.prompts} prompts" + ("" if noise.groups == noise.prompts else f" in {noise.groups} groups")
    text = (
        f"Another draw of this training buffer ({units}) would have moved the predicted change by "
        f"±{plain(noise.standard_error, 2)} {_UNIT} (standard error; 95% interval of the change: {signed(noise.low, 2)} "
        f"to {signed(noise.high, 2)}; P, momentum and clipping re-derived). The other errors on this page cover the choice of "
        "evaluation sequences for this one step, not that of the training buffer"
    )
    if noise.low <= 0 <= noise.high:
        return Sentence(text + "; with another buffer the step could have moved entropy the other way.", "warning")
    return Sentence(text + ".")


def _named(found: FirstUnit) -> bool:
    return (found.first_in or 0.0) > 0.5


def _thousandths(value: float, low: float | None = None, high: float | None = None) -> str:
    if low is None or high is None:
        return f"{signed(value * 1e3)} ×10⁻³ {_UNIT}"
    return f"{with_interval(value * 1e3, low * 1e3, high * 1e3)} ×10⁻³ {_UNIT}"


def _listed(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
