"""A schedule turns a recorded run into one prediction a step, with the error that it would log, from what it would have seen.

    Watch      measures the step on n sequences at every `every`-th step; optionally adds back the running mean of (lambda = 1) -
               (lambda) (entropy_core.bias_correction; `correction` is its `keep`), and filters: x_t = x_{t-1} + noise of variance
               q, y_t = x_t + its own error. `source`: the step's own sequences, or the pool (fresh sequences of held-out prompts,
               watched for several steps each and weighted to today's policy: none of them is ever trained on)
    Gradient   a running average of gradients, refreshed at every `refresh`-th step, along today's step (what the probe's gradient
               modes do); along the batch's part earlier gradients speak where there are any
    Snis       self-normalised importance sampling on n of these sequences
    Held       an estimator on n fresh sequences: what independence of the step would give

Steps of which a schedule measures nothing keep its last number, with the filter's error grown by the q of the steps since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from benchmarks.probe_replay.estimators import Estimator, contributions, momentum_scale, statistic
from benchmarks.probe_replay.pool import POOL_AGE
from benchmarks.probe_replay.tape import Estimated, Sequences, Tape, ratio
from entropy_core.bias_correction import BiasCorrection, PairedEstimates
from entropy_core.critic import EntropyCritic, token_features
from rl_training.intervals import t_quantile

Series = list[Estimated | None]
LONGEST_LAG = 6


@dataclass(frozen=True)
class CriticSettings:
    """See entropy_core.critic.EntropyCritic; hidden: whether V knows the projected hidden state, or position and H_k
    alone; own: whether it is fitted on all of the step's own sequences as well (their hidden states pass through the trainer)."""

    keep: float = 0.9
    ridge: float = 0.3
    folds: int = 4
    hidden: bool = True
    own: bool = False


@lru_cache(maxsize=256)
def _rows(prompt: tuple[int, ...], n: int, per_prompt: int) -> tuple[int, ...]:
    """Up to n sequences, at most per_prompt of a prompt, in the order of the prompts' first ones, second ones, ..."""
    taken: dict[int, int] = {}
    ranked = []
    for i, p in enumerate(prompt):
        taken[p] = taken.get(p, 0) + 1
        ranked.append((taken[p], i))
    order = [i for rank, i in sorted(ranked) if rank <= per_prompt]
    if per_prompt > 1 and n < len(order):
        # Whole prompts until n is reached, as the probe chooses.
        prompts = list(dict.fromkeys(prompt))[: -(-n // per_prompt)]
        order = [i for i in order if prompt[i] in prompts]
    return tuple(order[:n])


def choose(s: Sequences, n: int, per_prompt: int | None = None) -> Sequences:
    """n sequences: distinct prompts before further completions of one, or per_prompt completions of n / per_prompt prompts."""
    prompt = tuple(s.prompt.tolist())
    if n >= len(prompt):
        return s
    prompts = len(set(prompt))
    if per_prompt is None:
        return s.select(torch.tensor(_rows(prompt, min(n, prompts), 1) if n <= prompts else _spread(prompt, n)))
    return s.select(torch.tensor(_rows(prompt, n, per_prompt)))


def _spread(prompt: tuple[int, ...], n: int) -> tuple[int, ...]:
    taken: dict[int, int] = {}
    ranked = []
    for i, p in enumerate(prompt):
        taken[p] = taken.get(p, 0) + 1
        ranked.append((taken[p], i))
    return tuple(i for _, i in sorted(ranked)[:n])


class _Critic:
    """The library's critic on recorded tokens."""

    def __init__(self, settings: CriticSettings) -> None:
        self._settings = settings
        self._critic = EntropyCritic(folds=settings.folds, keep=settings.keep, ridge=settings.ridge)

    def values(self, s: Sequences, steps: int, also: Sequences | None = None) -> Tensor:
        """(N, T, 2), after taking in these sequences (and `also`); each gets the V of the other folds of prompts."""
        if also is not None:
            self._take_in(also, steps)
        features, fold = self._take_in(s, steps if also is None else 0)
        return self._critic.values(features, s.mask, fold)

    def _take_in(self, s: Sequences, steps: int) -> tuple[Tensor, Tensor]:
        fold = (s.extra["prompt_key"].long() if "prompt_key" in s.extra else s.prompt) % self._settings.folds
        features = token_features(s.entropy, s.mask, s.projected if self._settings.hidden else None)
        self._critic.observe(features, s.entropy, s.mask, fold, steps)
        return features, fold


@dataclass(frozen=True)
class Filter:
    """A local level: q, the variance of a step's change from the last one's, is the innovations' excess over what errors explain.

    keep: the last innovations weigh 1, keep, keep^2, ... `start`: so many are taken at face value first. relative: the level is
    that of dh/h, which a collapse changes less than dh. least: of the root of q, in units of the level itself.
    """

    keep: float = 0.95
    start: int = 2
    relative: bool = True
    least: float = 0.2


class LocalLevel:
    """State of `Filter`: the level, its variance, and q."""

    def __init__(self, settings: Filter) -> None:
        self._settings = settings
        self._level = self._variance = 0.0
        self._excess = self._weight = 0.0
        self._seen = 0
        self._since = 0

    @property
    def q(self) -> float:
        least = (self._settings.least * self._level) ** 2
        return max(least, self._excess / self._weight) if self._weight else least

    def pass_by(self) -> None:
        """A step of which nothing was measured."""
        self._since += 1

    def add(self, value: float, error: float) -> None:
        noise = error**2
        gap = self._since + 1
        self._since = 0
        if not self._seen:
            self._level, self._variance, self._seen = value, noise, 1
            return
        innovation = value - self._level
        excess = (innovation**2 - noise - self._variance) / gap
        self._excess = self._settings.keep * self._excess + excess
        self._weight = self._settings.keep * self._weight + 1
        self._seen += 1
        prior = self._variance + gap * self.q
        gain = 1.0 if self._seen <= self._settings.start else prior / (prior + noise)
        self._level += gain * innovation
        self._variance = noise if gain == 1.0 else (1 - gain) * prior

    def now(self) -> Estimated | None:
        if not self._seen:
            return None
        return Estimated(self._level, math.sqrt(self._variance + self._since * self.q))


@dataclass(frozen=True)
class Watch:
    """See the module's docstring. n: sequences; per_prompt: None takes distinct prompts first; ages: of the pool, those
    younger than so many steps."""

    estimator: Estimator
    n: int = 64
    source: Literal["own", "pool"] = "own"
    per_prompt: int | None = None
    every: int = 1
    critic: CriticSettings = CriticSettings()
    ages: int = POOL_AGE
    correction: float | None = None
    filter: Filter | None = None

    def series(self, tape: Tape) -> Series:
        critic = _Critic(self.critic)
        bias = None if self.correction is None else BiasCorrection(self.correction)
        level = LocalLevel(self.filter) if self.filter else None
        out: Series = []
        unit = 1.0
        for t, step in enumerate(tape.steps):
            if t % self.every:
                if level is not None:
                    level.pass_by()
                now = level.now() if level is not None else out[-1]
                out.append(None if now is None else Estimated(now.value * unit, now.error * unit, now.reach))
                continue
            s = choose(step.own, self.n, self.per_prompt) if self.source == "own" else self._pool(step.pool, t)
            values = None
            if self.estimator.advantages == "td" and self.estimator.critic:
                also = step.own if self.critic.own and self.source == "pool" else None
                values = critic.values(s, self.every, also)
            quiet, left_out = _of_step(self.estimator, s, values, t + 1)
            found = quiet
            if bias is not None:
                reference = _of_step(replace(self.estimator, decay=1.0), s, values, t + 1)
                pair = PairedEstimates.from_left_out(quiet.value, left_out, reference[0].value, reference[1])
                put_right = bias.add(pair)
                reach = t_quantile(put_right.degrees_of_freedom)
                found = Estimated(put_right.value, put_right.standard_error, reach)
            if level is not None:
                unit = s.h if self.filter is not None and self.filter.relative else 1.0
                level.add(found.value / unit, found.error / unit)
                now = level.now()
                assert now is not None
                found = Estimated(now.value * unit, now.error * unit, found.reach)
            out.append(found)
        return out

    def _pool(self, pool: Sequences, t: int) -> Sequences:
        """The first n slots, and of these what is younger than `ages` steps."""
        slots = torch.arange(min(self.n, len(pool.prompt)))
        return pool.select(slots[(t - slots) % POOL_AGE < self.ages])


def _of_step(estimator: Estimator, s: Sequences, values: Tensor | None, step: int) -> tuple[Estimated, Tensor]:
    """The statistic, of the whole step (from 1) where the estimator looks at the momentum's part; the first step has none."""
    if not estimator.tokens.endswith("momentum"):
        return statistic(estimator, s, values)
    if step == 1:
        whole = {"moved_momentum": "moved", "along_momentum": "along"}[estimator.tokens]
        return statistic(replace(estimator, tokens=whole), s, values)  # pyright: ignore[reportArgumentType]
    (found, left_out), scale = statistic(estimator, s, values), momentum_scale(step)
    return Estimated(scale * found.value, scale * found.error, found.reach), scale * left_out


@dataclass(frozen=True)
class Snis:
    """See the module's docstring."""

    n: int = 64
    source: Literal["own", "pool"] = "own"
    per_prompt: int | None = None

    def series(self, tape: Tape) -> Series:
        return [
            choose(s.own if self.source == "own" else s.pool, self.n, self.per_prompt).snis()[0] for s in tape.steps
        ]


@dataclass(frozen=True)
class Held:
    """On n fresh held-out sequences. The truth contains them; with n far below their number that matters little."""

    estimator: Estimator
    n: int = 64

    def series(self, tape: Tape) -> Series:
        critic, out = _Critic(CriticSettings()), []
        for step in tape.steps:
            s = step.held.select(torch.arange(self.n))
            values = critic.values(s, 1) if self.estimator.advantages == "td" else None
            out.append(statistic(self.estimator, s, values)[0])
        return out


@dataclass(frozen=True)
class Gradient:
    """averaging: weight of the earlier average when a new gradient enters; per_step: raised to the steps since the last one;
    score_only: the fixed-prefix half is never averaged; lagged_batch: see the module's docstring."""

    estimator: Estimator
    n: int = 16
    per_prompt: int | None = 4
    refresh: int = 1
    averaging: float = 0.75
    per_step: bool = False
    score_only: bool = False
    lagged_batch: bool = True

    def series(self, tape: Tape) -> Series:
        out: Series = []
        for t in range(len(tape)):
            newest = t - t % self.refresh
            weights = self._weights(t, newest)
            parts = []
            for place in (0, 1):  # along the batch's part, along the rest
                own = [
                    (k, w) for k, w in weights if not (place == 0 and self.lagged_batch and k == 0 and len(weights) > 1)
                ]
                total = sum(w for _, w in own)
                parts.append([(k, w / total) for k, w in own])
            pieces = [self._piece(tape, t, k, place, w, "score") for place in (0, 1) for k, w in parts[place]]
            fixed = [(newest, 1.0)] if self.score_only else None
            for place in (0, 1):
                used = parts[place] if fixed is None else [(t - newest, 1.0)]
                pieces += [self._piece(tape, t, k, place, w, "fixed") for k, w in used]
            value = sum(p.value for p in pieces)
            # Pieces of one refresh share sequences: their errors add up before the refreshes' are squared.
            by_age: dict[int, float] = {}
            for p, age in zip(pieces, self._ages(parts, t - newest, fixed is not None), strict=True):
                by_age[age] = by_age.get(age, 0.0) + p.error
            out.append(Estimated(value, math.hypot(*by_age.values()), pieces[0].reach))
        return out

    def _ages(self, parts: list[list[tuple[int, float]]], newest: int, fixed: bool) -> list[int]:
        ages = [k for place in (0, 1) for k, _ in parts[place]]
        return ages + ([newest, newest] if fixed else ages)

    def _weights(self, t: int, newest: int) -> list[tuple[int, float]]:
        """(age in steps, weight) of each refresh that can be replayed, newest first."""
        keep = self.averaging**self.refresh if self.per_step else self.averaging
        ages, weight, out = range(t - newest, t + 1, self.refresh), 1.0, []
        for age in ages:
            if age > LONGEST_LAG:
                break
            out.append((age, weight * (1 - keep) if age + self.refresh <= t else weight))
            weight *= keep
        total = sum(w for _, w in out)
        return [(age, w / total) for age, w in out if w > 0]

    def _piece(self, tape: Tape, t: int, age: int, place: int, weight: float, half: str) -> Estimated:
        found = _piece(tape, self.estimator, self.n, self.per_prompt, t, age, place, half)
        return Estimated(weight * found.value, weight * found.error, found.reach)


_pieces: dict[tuple[object, ...], Estimated] = {}


def _piece(
    tape: Tape, estimator: Estimator, n: int, per_prompt: int | None, t: int, age: int, place: int, half: str
) -> Estimated:
    """The score half or the fixed-prefix half of step t - age's gradient along a part of step t."""
    key = (tape.name, estimator, n, per_prompt, t, age, place, half)
    if key not in _pieces:
        step, own = tape.steps[t], tape.steps[t - age].own
        if age == 0:
            assert own.entropy_along is not None and own.logprob_along is not None
            part = slice(0, 1) if place == 0 else slice(1, 3)
            u, v = own.entropy_along[..., part].sum(-1), own.logprob_along[..., part].sum(-1)
        else:
            assert step.lagged_entropy is not None and step.lagged_logprob is not None
            u, v = (
                x[age - 1, : len(own.prompt), :, place].double() for x in (step.lagged_entropy, step.lagged_logprob)
            )
        marked = replace(own, extra={**own.extra, "u": u, "v": v})
        s = choose(marked, n, per_prompt)
        u, v = s.extra["u"], s.extra["v"]
        changes = (torch.zeros_like(u), v) if half == "score" else (u, torch.zeros_like(v))
        _pieces[key] = ratio(s.omega * contributions(estimator, s, changes=changes), s.omega * s.length, s.prompt)
    return _pieces[key]
