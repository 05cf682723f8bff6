"""What the entropy probe logged of a step, recomputed: `entropy_probe/entropy`, `measured` and
`measured_fixed_prefix`.

The probe watches some of the step's sequences before any was rejected, chosen by the run's seed,
and weights them against the way prompts were drawn. Which ones is found again from the run's
config.yaml; the logged `entropy_probe/weights_ess` says whether they are the right ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_experiments.audit.definition import Definition
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import RecordedRun, Sequence
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.errors import UserError
from rl_training.generation.rollout_sequences import choose
from rl_training.run.rollouts import read_rollouts, rollouts_path

METRICS = ("entropy", "measured", "measured_fixed_prefix")


@dataclass(frozen=True)
class ProbeDefinition(Definition):
    """The default is the probe's own; `PROBE_ALTERNATIVES` has the others in words."""

    quantity: str
    of: str = "entropy"
    temperature: float | None = None
    sequences: str = "watched"
    weights: str = "drawn"
    average: str = "tokens"
    policy: str = "before"
    sign: int = 1


PROBE_ALTERNATIVES: dict[str, dict[Any, str]] = {
    "quantity": {
        "entropy": "the entropy, not its change",
        "measured": "the change reweighted to the new policy",
        "measured_fixed_prefix": "the change on given tokens, without reweighting",
    },
    "of": {"surprisal": "surprisal in place of entropy"},
    "temperature": {1.0: "at temperature 1 in place of the sampling temperature"},
    "sequences": {
        "generated": "over all sequences of the first round, not those the probe watched",
        "kept": "over the filtered batch alone",
    },
    "weights": {"even": "without weights against the way prompts were drawn"},
    "average": {"completions": "per completion, not per token"},
    "policy": {"after": "under the policy after the step", "stale": "under the policy one step earlier"},
    "sign": {-1: "with its sign turned"},
}


class ProbeMeans:
    """Values at steps.

    Raises UserError at once where a run does not say which sequences its probe watched.
    """

    def __init__(self, run: RecordedRun, policies: Policies) -> None:
        path = run.folder / "config.yaml"
        if not path.exists():
            raise UserError("config.yaml, which says which sequences the probe watched, is not in the run folder")
        config = load_config(TrainConfig, path, [])
        if config.entropy_probe.rollouts != "current":
            raise UserError(
                "the sequences that the probe watched are not recorded by step: they are where it watches those of the step "
                "(entropy_probe.rollouts=current)"
            )
        self._run, self._policies, self._config = run, policies, config

    def weights_ess(self, step: int) -> float:
        """Effective number of the watched sequences, to be compared with the logged one; NaN where
        nothing is recorded.
        """
        rows = self._rows(step, "watched")
        return math.nan if not rows else float(1.0 / (_weights(rows, "drawn") ** 2).sum())

    def value(self, d: ProbeDefinition, steps: range) -> float:
        """NaN where it has none. Raises UserError where a policy cannot be had."""
        step = steps[-1]
        rows = self._rows(step, d.sequences)
        if not rows or len(steps) > 1:
            return math.nan
        before = {"before": step - 1, "after": step, "stale": step - 2}[d.policy]
        weights = _weights(rows, d.weights)
        start = self._mean(d, rows, weights, before)
        if d.quantity == "entropy":
            return d.sign * start
        if d.quantity == "measured":
            weights = _reweighted(weights, self._scores(d, rows, before + 1) - self._scores(d, rows, before))
        return d.sign * (self._mean(d, rows, weights, before + 1) - start)

    def _mean(self, d: ProbeDefinition, rows: list[Any], weights: np.ndarray, steps: int) -> float:
        values = self._values(d, rows, steps)
        sums = np.array([(v.entropy if d.of == "entropy" else -v.logprob)[_at(s)].sum() for s, v in values])
        units = np.array([s.length for s, _ in values]) if d.average == "tokens" else np.ones(len(values))
        return float((weights * sums).sum() / (weights * units).sum())

    def _scores(self, d: ProbeDefinition, rows: list[Any], steps: int) -> np.ndarray:
        return np.array([v.logprob[_at(s)].sum() for s, v in self._values(d, rows, steps)])

    def _values(self, d: ProbeDefinition, rows: list[Any], steps: int) -> list[Any]:
        sequences = [s for s, _ in rows]
        temperature = self._run.settings.temperature if d.temperature is None else d.temperature
        return list(zip(sequences, self._policies.values(steps, "float32", temperature, sequences), strict=True))

    def _rows(self, step: int, which: str) -> list[tuple[Sequence, float]]:
        """(sequence, log of its prompt's weight)."""
        if not rollouts_path(self._run.folder, step).exists():
            return []
        recorded = [s for s in read_rollouts(self._run.folder, step) if s.length]
        sequences = [s for s in recorded if (s.status != "rejected" if which == "kept" else s.round == 0)]
        probe = self._config.entropy_probe
        if which == "watched" and sequences:
            # The probe's own stream of random numbers, by the step that is about to be taken.
            rng = np.random.default_rng((self._config.training.seed, step - 1, 0, 0, 1))
            sequences = choose(sequences, probe.eval_sequences, probe.completions_per_prompt, rng)
        return [
            (
                Sequence(
                    s.prompt_ids, s.completion_ids, s.drawn or (True,) * len(s.completion_ids), len(s.completion_ids)
                ),
                s.log_prior,
            )
            for s in sequences
        ]


def _at(s: Sequence) -> np.ndarray:
    return len(s.prompt_ids) + np.flatnonzero(np.asarray(s.mask, dtype=bool))


def _weights(rows: list[tuple[Sequence, float]], which: str) -> np.ndarray:
    return _softmax(np.array([log if which == "drawn" else 0.0 for _, log in rows]))


def _reweighted(weights: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
    return _softmax(np.log(weights) + log_ratios)


def _softmax(logs: np.ndarray) -> np.ndarray:
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()
