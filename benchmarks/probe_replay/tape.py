"""Recorded steps as tensors, and the truth that estimates are held against.

truth_t     h(after) - h(before) on the fresh held-out sequences of the step, by self-normalised importance sampling
            (entropy_core.measurement); its error is a jackknife over prompts. Where fewer than half of the sequences count (steps
            too large for reweighting), the difference of h on the fresh sequences of the next step and of this one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.probe_replay.pool import POOL_AGE
from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import jackknife_standard_error, leave_one_prompt_out
from rl_training.intervals import t_quantile


@dataclass(frozen=True)
class Estimated:
    """A number with its standard error and how many standard errors its 95% interval reaches."""

    value: float
    error: float
    reach: float = 1.96


def ratio(numerators: Tensor, denominators: Tensor, prompt: Tensor) -> Estimated:
    """sum a / sum b over (N,) sequences with its jackknife over prompts."""
    left_out = leave_one_prompt_out(numerators, prompt, denominators)
    error = jackknife_standard_error(left_out)
    return Estimated(float(numerators.sum() / denominators.sum()), error, t_quantile(max(1, len(left_out) - 1)))


def behind_prompt(values: Tensor) -> Tensor:
    """(N, T, ...) -> (N, T + 1, ...) with zeros where `Sequences.batch` has its prompt."""
    return torch.cat([torch.zeros_like(values[:, :1]), values], 1)


@dataclass(frozen=True)
class Sequences:
    """Token arrays (N, T), float64, 0 behind the end of a completion; the rest (N,).

    logprob_along, entropy_along: (N, T, parts); projected: (N, T, 64); of the first sequences alone where N is large.

    omega: weights of mean 1 of the watched distribution against the one that drew the prompts (and, of held-out sequences, drawn
    up to a few steps ago, against the policy then).
    """

    mask: Tensor
    prompt: Tensor
    omega: Tensor
    logprob: Tensor
    entropy: Tensor
    logprob_after: Tensor
    entropy_after: Tensor
    logprob_along: Tensor | None = None
    entropy_along: Tensor | None = None
    projected: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> Tensor:
        return self.mask.double().sum(1)

    @cached_property
    def h(self) -> float:
        return float((self.omega * self.entropy.sum(1)).sum() / (self.omega * self.length).sum())

    @property
    def log_weights(self) -> Tensor:
        return self.omega.log()

    @cached_property
    def batch(self) -> SequenceBatch:
        """The same mask and prompts as the library takes them: behind a prompt of one token."""
        ids = torch.ones((len(self.mask), self.mask.shape[1] + 1), dtype=torch.long)
        first = torch.ones((len(self.mask), 1), dtype=torch.bool)
        return SequenceBatch(ids, torch.cat([first, self.mask], 1), torch.cat([~first, self.mask], 1), self.prompt)

    def statistics(self, after: bool = False) -> TokenStatistics:
        """In the layout of `batch`."""
        pair = (self.logprob_after, self.entropy_after) if after else (self.logprob, self.entropy)
        return TokenStatistics(*(behind_prompt(x) for x in pair))

    def select(self, rows: Tensor) -> Sequences:
        """Of the sequences at these indices; weights again of mean 1."""

        def of(value: Tensor | None) -> Tensor | None:
            return None if value is None or int(rows.max()) >= len(value) else value[rows]

        return Sequences(
            self.mask[rows],
            self.prompt[rows],
            self.omega[rows] / self.omega[rows].mean(),
            self.logprob[rows],
            self.entropy[rows],
            self.logprob_after[rows],
            self.entropy_after[rows],
            of(self.logprob_along),
            of(self.entropy_along),
            of(self.projected),
            {name: value[rows] for name, value in self.extra.items()},
        )

    def snis(self) -> tuple[Estimated, float]:
        """The change of h by self-normalised importance sampling, and the share of sequences that count after it."""
        start = self.omega / self.omega.sum()
        after = torch.softmax(start.log() + (self.logprob_after - self.logprob).sum(1), 0)
        length, prompt = self.length, self.prompt
        left_out = leave_one_prompt_out(after * self.entropy_after.sum(1), prompt, after * length)
        left_out = left_out - leave_one_prompt_out(start * self.entropy.sum(1), prompt, start * length)
        change = float((after * self.entropy_after.sum(1)).sum() / (after * length).sum()) - self.h
        effective = float(1 / after.square().sum()) / len(after)
        return Estimated(change, jackknife_standard_error(left_out), t_quantile(len(left_out) - 1)), effective


@dataclass(frozen=True)
class RecordedStep:
    """own: the step's own sequences; held: fresh ones; pool: fresh ones watched for several steps; numbers: as recorded.
    pool_log_weights: (N,) log-ratio of the policy before the step to the one that drew each sequence of the pool.

    lagged_logprob, lagged_entropy: (K, N, T, 2) derivatives of earlier own sequences along this step; NaN without such a step.
    """

    own: Sequences
    held: Sequences
    pool: Sequences
    numbers: dict[str, float]
    lagged_logprob: Tensor | None
    lagged_entropy: Tensor | None
    pool_log_weights: Tensor = field(default_factory=lambda: torch.zeros(0))


def load_step(path: Path) -> RecordedStep:
    arrays = np.load(path)

    def tensor(name: str, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return torch.from_numpy(arrays[name]).to(dtype) if name in arrays else None

    own = _sequences(arrays, "own", torch.softmax(torch.from_numpy(arrays["own_log_prior"]), 0))
    held, pool = (
        _sequences(
            arrays, kind, torch.softmax(torch.from_numpy(arrays[f"{kind}_score"] - arrays[f"{kind}_drawn_score"]), 0)
        )
        for kind in ("held", "pool")
    )
    numbers = dict(zip(arrays["number_names"].tolist(), arrays["numbers"].tolist(), strict=True))
    lagged = (tensor("lagged_logprob_along", torch.float32), tensor("lagged_entropy_along", torch.float32))
    log_weights = torch.from_numpy(arrays["pool_score"] - arrays["pool_drawn_score"])
    return RecordedStep(own, held, pool, numbers, *lagged, log_weights)


def _sequences(arrays: np.lib.npyio.NpzFile, kind: str, weights: Tensor) -> Sequences:
    def tensor(name: str) -> Tensor:
        return torch.from_numpy(arrays[f"{kind}_{name}"]).double()

    def maybe(name: str) -> Tensor | None:
        return tensor(name) if f"{kind}_{name}" in arrays else None

    length = torch.from_numpy(arrays[f"{kind}_length"])
    mask = torch.arange(arrays[f"{kind}_logprob"].shape[1]) < length[:, None]
    names = ("advantage", "weight", "prompt_key", "collision", "sharpness", "variance", "share")
    names = (*names, "logprob_batch", "entropy_batch")
    prompt = torch.from_numpy(arrays["own_prompt"]) if kind == "own" else torch.arange(len(length))
    return Sequences(
        mask,
        prompt,
        weights * len(weights),
        tensor("logprob"),
        tensor("entropy"),
        tensor("logprob_after"),
        tensor("entropy_after"),
        maybe("logprob_along"),
        maybe("entropy_along"),
        maybe("projected"),
        {name: value for name in names if (value := maybe(name)) is not None},
    )


@dataclass(frozen=True)
class Tape:
    """A recorded run. truth: of each step; from_fresh: whether it is the difference of fresh samples."""

    name: str
    steps: list[RecordedStep]
    truth: list[Estimated]
    from_fresh: list[bool]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def pool_age(self) -> int:
        """Steps that a slot of the pool keeps its sequence."""
        return int(self.steps[0].numbers.get("pool_age", POOL_AGE))

    @cached_property
    def levels(self) -> list[Estimated]:
        """h before each step on its fresh sequences."""
        return [ratio(s.omega * s.entropy.sum(1), s.omega * s.length, s.prompt) for s in (x.held for x in self.steps)]

    def has(self, what: str) -> bool:
        """Whether the recording holds `along` (own derivatives), `own_part`, `held_along` or `lagged`; true for nothing."""
        step = self.steps[-1]
        own, held = step.own.logprob_along, step.held.logprob_along
        return {
            "": True,
            "along": own is not None,
            "own_part": own is not None and own.shape[-1] == 4,
            "held_along": held is not None,
            "lagged": own is not None and step.lagged_logprob is not None,
        }[what]


def load_tape(name: str, folder: Path) -> Tape:
    steps = [load_step(path) for path in sorted((folder / "steps").glob("step-*.npz"))]
    found = [step.held.snis() for step in steps]
    truth, from_fresh = [], []
    for t, (change, effective) in enumerate(found):
        fresh = effective < 0.5 and t + 1 < len(steps)
        truth.append(_fresh_difference(steps[t].held, steps[t + 1].held) if fresh else change)
        from_fresh.append(fresh)
    return Tape(name, steps, truth, from_fresh)


def _fresh_difference(before: Sequences, after: Sequences) -> Estimated:
    levels = [ratio(s.omega * s.entropy.sum(1), s.omega * s.length, s.prompt) for s in (before, after)]
    error = float(np.hypot(levels[0].error, levels[1].error))
    return Estimated(levels[1].value - levels[0].value, error)
