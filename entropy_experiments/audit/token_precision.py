"""How far a mean over tokens can be recomputed: rounding of half-precision passes, and an unknown
order of micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import RecordedRun
from entropy_experiments.audit.token_definitions import TokenDefinition, TokenMeans

# Standard deviations that a tolerance reaches.
_REACH = 4.0
_SHUFFLES = 400


class TokenPrecision:
    """Tolerances beyond float32's."""

    def __init__(self, run: RecordedRun, policies: Policies, means: TokenMeans) -> None:
        self._run, self._policies, self._means = run, policies, means

    def of_run(self, steps: range, right: TokenDefinition) -> float:
        """What the trainer's own precision, and an order that was not recorded, leave open."""
        half = self._policies.precision if self._policies.precision in ("bf16", "fp16") else None
        noise = 0.0 if half is None else self.noise(steps, replace(right, precision="float32"), right)
        return noise + self._order(steps, right)

    def slack(self, definition: TokenDefinition, steps: range) -> float:
        """Of an alternative: two bfloat16 computations of one number differ by so much, and two
        orders of its sequences.
        """
        order = self._order(steps, definition) if definition.sequences == "loss" else 0.0
        if definition.precision in ("run", "float32"):
            return order
        return order + self.noise(steps, replace(definition, precision="run"), definition)

    def noise(self, steps: range, fine: TokenDefinition, coarse: TokenDefinition) -> float:
        """From how much single tokens change between two precisions: the spread of their mean,
        without its shift.
        """
        changes = []
        for step in steps:
            for row in (s for batch in self._run.record(step).micro_batches for s in batch):
                at = len(row.prompt_ids) + np.flatnonzero(np.asarray(row.mask, dtype=bool))
                changes.append(
                    self._means.token_quantity(coarse, row, step)[at] - self._means.token_quantity(fine, row, step)[at]
                )
        found = np.concatenate(changes) if changes else np.zeros(0)
        return _REACH * float(found.std()) * math.sqrt(2 / len(found)) if len(found) else 0.0

    def _order(self, steps: range, definition: TokenDefinition) -> float:
        """Spread of the mean of micro-batches' means over orders of the sequences, where the order
        is not known.
        """
        if definition.lag or definition.average not in ("micro_batches", "sequences", "completions"):
            return 0.0
        variance = 0.0
        for step in steps:
            record = self._run.record(step)
            if record.order_known:
                continue
            rows = [s for batch in record.micro_batches for s in batch]
            sums = np.array([self._means.tokens_of(definition, s, step) for s in rows])
            rng, size = np.random.default_rng(step), len(rows) // record.micro_batch_count
            if size * record.micro_batch_count != len(rows):
                return math.inf
            found = []
            for _ in range(_SHUFFLES):
                parts = sums[rng.permutation(len(rows))].reshape(record.micro_batch_count, size, 2).sum(1)
                found.append(float((parts[:, 0] / parts[:, 1].clip(1)).mean()))
            middle = sums[:, 0].sum() / sums[:, 1].sum()
            variance += float(np.mean((np.array(found) - middle) ** 2))
        return _REACH * math.sqrt(variance) / len(steps)
