"""What a logged length or reward may be the mean of: a definition with one field for each choice,
and its value at a step.

The definition with every field at its default is TRL's: one value for each call of the generator,
over all sequences it returned before any selection, and the mean of these values since the last
log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from entropy_experiments.audit.definition import Definition
from entropy_experiments.audit.recorded_run import RecordedRun, Sequence, StepRecord
from entropy_experiments.audit.token_definitions import groups_of, total_reward


@dataclass(frozen=True)
class BatchDefinition(Definition):
    """Each field's values, and what each means in words, stand in `alternatives`."""

    of: str
    """length, reward, reward:<n> (of function n), truncated, no_difference (1 for a group whose
    rewards are equal).
    """
    statistic: str = "mean"
    sequences: str = "all"
    average: str = "rounds"
    lag: int = 0
    window: str = "mean"


_LENGTHS = {
    "with_foreign": "tokens that the policy did not draw (tools, an environment) are counted",
    "without_eos": "the end-of-sequence token is left out",
    "padded": "padding is counted",
    "with_prompt": "tokens of the prompt are counted",
    "characters_left": "what is left of max_completion_length in place of the length",
}
_STATISTICS = {
    "mean": "a mean",
    "min": "a minimum",
    "max": "a maximum",
    "median": "a median",
    "std": "a standard deviation",
    "population_std": "a standard deviation with n in place of n − 1",
    "std_of_groups": "the mean of the groups' standard deviations",
    "best_of_group": "the mean of each group's best",
    "sum": "a sum",
}
_COMMON: dict[str, dict[Any, str]] = {
    "sequences": {
        "terminated": "over sequences that ended by themselves alone (truncated ones left out)",
        "truncated": "over truncated sequences alone",
        "kept": "over the filtered batch alone (sequences in the loss)",
        "informative": "over the filtered batch alone (groups whose rewards differ)",
        "first_round": "over the first round of generation alone",
        "last_round": "over the last round of generation alone",
        "all": "over everything that was generated",
        "one_rank": "over the main process's sequences alone",
    },
    "average": {
        "pooled": "mean over all sequences of the step, not of the rounds' means",
        "rounds": "mean of the rounds' means, not over all sequences of the step",
    },
    "lag": {-1: "the value of the step before", 1: "the value of the step after"},
    "window": {
        "last": "of the last step since the last log alone, not the mean over them",
        "first": "of the first step since the last log alone, not the mean over them",
    },
}


def alternatives(definition: BatchDefinition, run: RecordedRun) -> dict[str, dict[Any, str]]:
    """field -> value -> words, for a metric whose right definition is `definition`."""
    kind = definition.of.split(":")[0]
    names, of = run.settings.reward_names, {}
    if kind == "length":
        of = _LENGTHS
    elif kind == "truncated":
        of = {"at_longest": "those of the maximal length, ended or not", "ended": "those that ended by themselves"}
    elif kind == "reward":
        of = {f"reward:{n}": f"the reward of {name!r} alone" for n, name in enumerate(names)}
        of |= {"reward": "the total reward, weighted, of all functions"}
        of |= {"unweighted": "the sum of all functions, unweighted", "advantage": "reward less its group's mean"}
        of |= {f"again:{name}": f"rewards of {name!r} in place of the run's" for name in run.other_rewards}
    elif kind == "no_difference":
        of = {"difference": "groups whose rewards differ"}
    statistics = {} if kind in ("truncated", "no_difference") else _STATISTICS
    return {
        "of": of,
        "statistic": {k: f"{v} in place of {_STATISTICS[definition.statistic]}" for k, v in statistics.items()},
        **_COMMON,
    }


# Rewards of so few different values make means of few different values.
_FEW_VALUES = 20


class BatchMeans:
    """Values of definitions at logged windows of steps."""

    def __init__(self, run: RecordedRun) -> None:
        self._run, self._settings = run, run.settings
        self._ends = {*run.settings.eos_token_ids, run.settings.pad_token_id}

    def value(self, definition: BatchDefinition, steps: range) -> float:
        """NaN where it has no value; a window none of whose steps generated anything has none."""
        parts = []
        for step in steps:
            record = self._run.record(step + definition.lag) if step + definition.lag >= 1 else None
            if record is None:
                return math.nan
            parts.append(self._entries(definition, record))
        parts = [p for p in parts if p]
        if definition.window in ("first", "last") and parts:
            parts = [parts[0] if definition.window == "first" else parts[-1]]
        entries = [e for part in parts for e in part if not math.isnan(e)]
        return float(np.mean(entries)) if entries else math.nan

    def grain(self, d: BatchDefinition, steps: range) -> float:
        """Distance between neighbouring values that the metric could take; 0 where rewards are
        many-valued, or for a spread.
        """
        rows = [s for step in steps for generated in self._run.record(step).rounds for s in generated]
        if d.statistic not in ("mean", "min", "max") or not rows:
            return 0.0
        spacing = 1.0
        if d.of.startswith("reward"):
            values = sorted({v for s in rows if not math.isnan(v := self._of_sequence(d.of, s))})
            if len(values) > _FEW_VALUES:
                return 0.0
            spacing = min((b - a for a, b in pairwise(values)), default=1.0)
        return spacing / (len(rows) if d.statistic == "mean" else 1)

    def _entries(self, d: BatchDefinition, record: StepRecord) -> list[float]:
        rounds = [list(generated) for generated in record.rounds]
        if d.sequences == "first_round":
            rounds = rounds[:1]
        elif d.sequences == "last_round":
            rounds = rounds[-1:]
        if d.average == "pooled":
            rounds = [[s for generated in rounds for s in generated]] if rounds else []
        return [self._of_round(d, generated) for generated in rounds]

    def _of_round(self, d: BatchDefinition, generated: Many[Sequence]) -> float:
        groups = groups_of(generated, self._settings)
        values = [self._of_group(d.of, group) for group in groups]
        if d.of in ("no_difference", "difference"):
            values = [
                [float((v[0] == 0.0) == (d.of == "no_difference"))] * len(group)
                for v, group in zip(values, groups, strict=True)
            ]
        kept = [
            [v for v, s in zip(vs, group, strict=True) if self._chosen(d.sequences, s, group) and not math.isnan(v)]
            for vs, group in zip(values, groups, strict=True)
        ]
        return _statistic(d.statistic, [k for k in kept if k], d.of == "length" and d.sequences == "terminated")

    def _chosen(self, which: str, s: Sequence, group: Many[Sequence]) -> bool:
        if which == "terminated":
            return not self._truncated(s)
        if which == "truncated":
            return self._truncated(s)
        if which == "kept":
            return s.kept
        if which == "one_rank":
            return s.rank == 0
        if which == "informative":
            return _spread([total_reward(m, self._settings) for m in group]) != 0.0
        return True

    def _truncated(self, s: Sequence) -> bool:
        return not s.completion_ids or s.completion_ids[-1] not in self._ends

    def _of_group(self, of: str, group: Many[Sequence]) -> list[float]:
        if of in ("no_difference", "difference"):
            return [_spread([total_reward(s, self._settings) for s in group])] * len(group)
        if of == "advantage":
            rewards = [total_reward(s, self._settings) for s in group]
            return [r - float(np.nanmean(rewards)) for r in rewards]
        return [self._of_sequence(of, s) for s in group]

    def _of_sequence(self, of: str, s: Sequence) -> float:
        if of == "reward":
            return total_reward(s, self._settings)
        if of == "unweighted":
            known = [r for r in s.rewards or () if r is not None]
            return sum(known) if known else math.nan
        if of.startswith("reward:"):
            found = (s.rewards or ())[int(of[7:])] if int(of[7:]) < len(s.rewards or ()) else None
            return math.nan if found is None else found
        if of.startswith("again:"):
            found = self._run.other_rewards[of[6:]].get((s.prompt_ids, s.completion_ids))
            return math.nan if found is None else found
        if of == "truncated":
            return float(self._truncated(s))
        if of == "ended":
            return float(not self._truncated(s))
        if of == "at_longest":
            return float(len(s.completion_ids) >= self._settings.max_completion_length)
        return self._length(of, s)

    def _length(self, of: str, s: Sequence) -> float:
        drawn = float(s.length)
        if of == "with_foreign":
            return float(len(s.completion_ids))
        if of == "without_eos":
            ends = bool(s.completion_ids) and s.completion_ids[-1] in self._settings.eos_token_ids and s.mask[-1]
            return drawn - float(ends)
        if of == "padded":
            return float(max(s.width, len(s.completion_ids)))
        if of == "with_prompt":
            return drawn + len(s.prompt_ids)
        return drawn if of == "length" else self._settings.max_completion_length - drawn


def _spread(rewards: Many[float]) -> float:
    """0.0 where TRL finds no standard deviation in a group's rewards; of fewer than two it finds
    none that is zero.
    """
    known = np.array([r for r in rewards if not math.isnan(r)])
    if len(known) < 2:
        return 1.0
    return 0.0 if np.isclose(known.std(ddof=1), 0.0) else 1.0


def _statistic(name: str, groups: Many[Many[float]], zero_if_none: bool) -> float:
    """Of values by group; groups are not empty.

    Args:
        zero_if_none: TRL's length of terminated sequences where there are none.
    """
    values = np.array([v for group in groups for v in group])
    if not len(values):
        return 0.0 if zero_if_none else math.nan
    if name in ("std", "population_std"):
        least = 2 if name == "std" else 1
        return float(values.std(ddof=least - 1)) if len(values) >= least else math.nan
    if name == "std_of_groups":
        found = [np.std(g, ddof=1) for g in groups if len(g) > 1]
        return float(np.mean(found)) if found else math.nan
    if name == "best_of_group":
        return float(np.mean([max(g) for g in groups]))
    reduce = {"mean": np.mean, "min": np.min, "max": np.max, "median": np.median, "sum": np.sum}[name]
    return float(reduce(values))
