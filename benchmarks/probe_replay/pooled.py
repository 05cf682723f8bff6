"""The watch of a pool as the probe does it (rl_training.probe.watch, integrations.sequence_pool, probe.spans), on a recording.

A recording holds each slot's tokens before and after every step, while the slot keeps its sequence. A span's change is that of
the slots that keep theirs through it. Where fewer than ENOUGH of the sequences would count, the older ones leave; what is drawn
in their place are fresh held-out sequences of the step where the span is of one step, and for the steps to come the slots that
the recording drew since (so that early renewal is replayed with fewer sequences than it has).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.probe_replay.estimators import behind_prompt
from benchmarks.probe_replay.schedules import CriticSettings, Filter, LocalLevel, Series
from benchmarks.probe_replay.tape import Estimated, Sequences, Tape, ratio
from entropy_core.critic import EntropyCritic, token_features
from entropy_core.entropy import effective_sample_size
from entropy_core.running_sum import RunningSum
from entropy_core.token_ratios import token_ratio_change
from rl_training.integrations.sequence_pool import ENOUGH
from rl_training.intervals import t_quantile
from rl_training.probe.spans import Spans


@dataclass(frozen=True)
class Measured:
    """A span, steps counted from 0: its change in all, h before it with the pool's error, and the sum of all changes so far."""

    first: int
    last: int
    change: Estimated
    entropy: Estimated
    total: Estimated


class Trend:
    """A local linear trend (Harvey 1989) of the relative change, in place of a level: the slope wanders as well.

    slope: standard deviation of its step, relative to that of the level.
    """

    def __init__(self, settings: Filter, slope: float = 0.1) -> None:
        self._settings, self._slope = settings, slope
        self._mean, self._covariance = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        self._excess = self._weight = 0.0
        self._seen = 0

    def add(self, value: float, error: float) -> None:
        noise, self._seen = error**2, self._seen + 1
        if self._seen == 1:
            self._mean[0], self._covariance[0, 0] = value, noise
            return
        move = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        mean, covariance = move @ self._mean, move @ self._covariance @ move.T
        innovation = value - float(mean[0])
        keep = self._settings.keep
        self._excess = keep * self._excess + innovation**2 - noise - float(covariance[0, 0])
        self._weight = keep * self._weight + 1
        q = max((self._settings.least * float(mean[0])) ** 2, self._excess / self._weight)
        covariance = covariance + torch.diag(torch.tensor([q, self._slope**2 * q], dtype=torch.float64))
        gain = covariance[:, 0] / (covariance[0, 0] + noise)
        if self._seen <= self._settings.start:
            gain = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self._mean, self._covariance = mean + gain * innovation, covariance - torch.outer(gain, covariance[0])

    def now(self) -> Estimated:
        return Estimated(float(self._mean[0]), math.sqrt(max(float(self._covariance[0, 0]), 0.0)))


@dataclass(frozen=True)
class PooledWatch:
    """n: slots. span: steps that a measurement is over at most. renewed: early, where few would count. filter: none, a local
    level or a local trend of the spans' mean relative changes."""

    n: int = 64
    span: int = 1
    decay: float = 0.9
    renewed: bool = True
    filter: Literal["none", "level", "trend"] = "level"
    critic: CriticSettings = CriticSettings()

    def measured(self, tape: Tape) -> list[Measured]:
        critic = EntropyCritic(folds=self.critic.folds, keep=self.critic.keep, ridge=self.critic.ridge)
        out, total, spans, oldest, before, last = [], RunningSum(), Spans(self.span), math.inf, 0, len(tape) - 1
        while before <= last:
            spans.begin()
            after = before
            while not spans.took() and after < last:
                after += 1
            s, units, oldest = self._watched(tape, before, after, oldest)
            oldest += after + 1 - before
            fold = s.extra["prompt_key"].long() % self.critic.folds
            features = token_features(s.entropy, s.mask, s.projected)
            critic.observe(features, s.entropy, s.mask, fold, before - out[-1].first if out else 1)
            values = behind_prompt(critic.values(features, s.mask, fold))
            statistics = (s.statistics(), s.statistics(after=True))
            found = token_ratio_change(*statistics, s.batch, values, self.decay, s.log_weights)
            sum_ = total.add(found.change, found.left_out, units)
            out.append(
                Measured(
                    before,
                    after,
                    Estimated(found.change, found.standard_error, t_quantile(found.degrees_of_freedom)),
                    ratio(s.omega * s.entropy.sum(1), s.omega * s.length, s.prompt),
                    Estimated(sum_.value, sum_.standard_error, t_quantile(sum_.degrees_of_freedom)),
                )
            )
            ratios = (s.logprob_after - s.logprob).sum(1)
            spans.end(effective_sample_size((ratios - ratios.max()).exp()) / len(ratios))
            before = after + 1
        return out

    def series(self, tape: Tape) -> Series:
        """The spans' means, each at all of its steps."""
        state = {"none": None, "level": LocalLevel(Filter()), "trend": Trend(Filter())}[self.filter]
        out: Series = []
        for m in self.measured(tape):
            steps = m.last - m.first + 1
            each = Estimated(m.change.value / steps, m.change.error / steps, m.change.reach)
            if state is not None:
                h = m.entropy.value
                state.add(each.value / h, each.error / h)
                now = state.now()
                assert now is not None
                each = Estimated(now.value * h, now.error * h, each.reach)
            out += [each] * steps
        return out

    def _watched(self, tape: Tape, before: int, after: int, oldest: float) -> tuple[Sequences, list[str], float]:
        """What is watched over a span, a name for each sequence, and how many steps ago the oldest can have been drawn."""
        start, end, slots = tape.steps[before], tape.steps[after], torch.arange(min(self.n, 64))
        age = ((before - slots) % tape.pool_age).clamp(max=before)
        kept = torch.ones(len(slots), dtype=torch.bool)
        for step in range(before + 1, after + 1):
            kept &= slots % tape.pool_age != step % tape.pool_age
        wanted, log_weights = int(kept.sum()), start.pool_log_weights[slots]
        alone = after == before and start.held.projected is not None
        allowed = min(oldest, float(tape.pool_age))
        while self.renewed and allowed > 0:
            staying = kept & (age <= allowed)
            fresh = torch.zeros(wanted - int(staying.sum()) if alone else 0, dtype=torch.float64)
            weights = torch.cat([log_weights[staying], fresh]).exp()
            if len(weights) > 1 and effective_sample_size(weights) >= ENOUGH * len(weights):
                break
            allowed -= 1
        rows = (kept & (age <= allowed)).nonzero()[:, 0]
        s, later = start.pool.select(rows), end.pool.select(rows)
        s = replace(s, logprob_after=later.logprob_after, entropy_after=later.entropy_after)
        units, log_weights = [str(int(key)) for key in s.extra["prompt_key"].tolist()], log_weights[rows]
        if alone and len(rows) < wanted:
            fresh = start.held.select(torch.arange(wanted - len(rows)))
            s, units = _joined(s, fresh), units + [f"fresh {before} {k}" for k in range(wanted - len(rows))]
            log_weights = torch.cat([log_weights, torch.zeros(wanted - len(rows), dtype=torch.float64)])
        omega = log_weights.exp()
        return replace(s, omega=omega / omega.mean()), units, min(oldest, allowed)


def _joined(a: Sequences, b: Sequences) -> Sequences:
    def both(name: str) -> Tensor:
        return torch.cat([getattr(a, name), getattr(b, name)])

    names = ("mask", "omega", "logprob", "entropy", "logprob_after", "entropy_after", "projected")
    found = {name: both(name) for name in names}
    keys = torch.arange(len(b.prompt)).double()  # a fold of the critic each; no two steps share a fresh sequence
    prompt = torch.cat([a.prompt, 1000 + b.prompt])
    return Sequences(prompt=prompt, extra={"prompt_key": torch.cat([a.extra["prompt_key"], keys])}, **found)
