"""Which policy drew the sequences that a trainer passes in a step: today's, or one of an earlier
step.

Trainers train on sequences more than once (several iterations, more micro-batches in a generation
than in a step, a buffer of old ones). What is estimated of today's policy on them needs the
log-probability S that each had when it was drawn,

    log weight = S_today - S_drawn ,

and both must come from the same arithmetic: a trainer's own record, in bfloat16 over hundreds of
tokens, is off by nats. So scores are taken by the probe's pass while the policy is still the one
that drew, and remembered by the sequence.

A sequence that was seen before is a replay where drawing it once more would be a coincidence: with
n draws of its prompt remembered, n exp(S) is how often that is expected. Likely completions (of a
collapsed policy, say) are drawn again and again, and are taken for replays only if most of the
unlikely ones beside them are.
Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_training.sequences import RolloutSequence

_COINCIDENCE = 1e-3
# Log-probabilities of whole sequences, root mean square: recorded ones that are as near to the
# probe's own are as good.
_AGREES = 0.05
_MOST_REMEMBERED = 200_000


@dataclass
class _Seen:
    """One sequence as it was first seen.

    Attributes:
        step: when it was first seen.
        score: S then, NaN where no pass was made over it.
    """

    step: int
    score: float = math.nan


@dataclass(frozen=True)
class Drawn:
    """What is known of the policies that drew some sequences.

    Attributes:
        places: of the sequences whose policy is known.
        scores: theirs when they were drawn, None where today's policy drew all.
        replayed, unknown: how many were drawn earlier, and how many of those cannot be weighted.
        doubtful: recorded log-probabilities say that another policy drew them, and are too coarse
            to say which.
    """

    places: list[int]
    scores: Tensor | None
    replayed: int = 0
    unknown: int = 0
    doubtful: bool = False


class DrawnPolicies:
    """Remembers sequences by their tokens, those of the latest steps; every process holds the same."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._draws: Counter[int] = Counter()
        self._recorded_off: float | None = None

    def note(self, sequences: Sequence[RolloutSequence], step: int) -> None:
        """These passed, or were generated, in `step`."""
        for s in sequences:
            if (key := _key(s)) not in self._seen:
                self._seen[key] = _Seen(step)
                self._draws[_digest(s.prompt_ids)] += 1
        while len(self._seen) > _MOST_REMEMBERED:
            del self._seen[next(iter(self._seen))]

    def remember(self, sequences: Sequence[RolloutSequence], scores: Tensor, step: int) -> None:
        """Take in the scores of sequences.

        Args:
            scores: (N,) of these under the policy of `step`, kept for those that were first seen in
                it.
        """
        self.note(sequences, step)
        for s, score in zip(sequences, scores.tolist(), strict=True):
            seen = self._seen[_key(s)]
            if seen.step == step and math.isnan(seen.score):
                seen.score = score

    def known(self, sequences: Sequence[RolloutSequence], step: int) -> list[RolloutSequence]:
        """Those of them that were seen before `step` with a score."""
        return [s for s in sequences if (seen := self._before(s, step)) is not None and not math.isnan(seen.score)]

    def seen_before(self, sequences: Sequence[RolloutSequence], step: int) -> bool:
        """Whether some of them were, so that they may be replays."""
        return any(self._before(s, step) is not None for s in sequences)

    def wants_score(self, sequence: RolloutSequence, step: int) -> bool:
        """Whether it was first seen in `step` and has no score yet."""
        seen = self._seen.get(_key(sequence))
        return seen is None or (seen.step == step and math.isnan(seen.score))

    def _before(self, sequence: RolloutSequence, step: int) -> _Seen | None:
        seen = self._seen.get(_key(sequence))
        return seen if seen is not None and seen.step < step else None

    def drawn(self, sequences: Sequence[RolloutSequence], today: Tensor, step: int, replayed: bool = False) -> Drawn:
        """Find the policies that drew sequences.

        Args:
            today: (N,) scores under today's policy.
            replayed: it is known that those seen before are replays.
        """
        scores, before = today.double().tolist(), [self._before(s, step) for s in sequences]
        unlikely = [self._is_unlikely(*found) for found in zip(sequences, scores, before, strict=True)]
        told = [seen is not None for seen, sure in zip(before, unlikely, strict=True) if sure]
        most = replayed or (len(told) > 0 and 2 * sum(told) > len(told))
        places, out, count = [], [], 0
        new: list[int] = []
        for i, (seen, sure) in enumerate(zip(before, unlikely, strict=True)):
            if seen is not None and (sure or most):
                count += 1
                if not math.isnan(seen.score):
                    places.append(i)
                    out.append(seen.score)
                continue
            places.append(i)
            out.append(scores[i])
            new.append(len(out) - 1)
        doubtful = self._use_records(sequences, places, out, new)
        unknown = len(sequences) - len(places)
        same = all(value == scores[i] for i, value in zip(places, out, strict=True))
        found = None if same else torch.tensor(out, dtype=torch.float64, device=today.device)
        return Drawn(places, found, count, unknown, doubtful)

    def _is_unlikely(self, sequence: RolloutSequence, score: float, seen: _Seen | None) -> bool:
        likeliest = score if seen is None or math.isnan(seen.score) else max(score, seen.score)
        return max(1, self._draws[_digest(sequence.prompt_ids)]) * math.exp(min(likeliest, 0.0)) < _COINCIDENCE

    def _use_records(
        self, sequences: Sequence[RolloutSequence], places: list[int], out: list[float], new: list[int]
    ) -> bool:
        """Of sequences that were never seen before, take the trainer's recorded scores where these
        are known to agree with the probe's own; whether they say that another policy drew them,
        and do not agree well enough to be taken.
        """
        records = {j: sequences[places[j]].drawn_score for j in new}
        off = {j: record - out[j] for j, record in records.items() if record is not None}
        if not off:
            return False
        size = math.sqrt(sum(value**2 for value in off.values()) / len(off))
        if self._recorded_off is None:  # the first there are: the policy is still the one that drew them
            self._recorded_off = size
            return False
        if size <= max(_AGREES, 3 * self._recorded_off):
            return False
        if self._recorded_off > _AGREES:
            return True
        for j, value in off.items():
            out[j] += value
        return False

    # ------------------------------------------------------------------ for a checkpoint
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and a number more, for `load`: 24 bytes a sequence."""
        seen = self._seen.values()
        return {
            "sequences": torch.tensor(list(self._seen), dtype=torch.int64),
            "steps": torch.tensor([s.step for s in seen], dtype=torch.int64),
            "scores": torch.tensor([s.score for s in seen], dtype=torch.float64),
            "prompts": torch.tensor(list(self._draws), dtype=torch.int64),
            "draws": torch.tensor(list(self._draws.values()), dtype=torch.int64),
        }, {"recorded_off": self._recorded_off}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: what is not a state.
        """
        names, off = ("sequences", "steps", "scores", "prompts", "draws"), values.get("recorded_off")
        if not all(name in tensors and tensors[name].dim() == 1 for name in names):
            raise ValueError("its record of known sequences is incomplete")
        keys, steps, scores, prompts, draws = (tensors[name].tolist() for name in names)
        if not len(keys) == len(steps) == len(scores) <= _MOST_REMEMBERED or len(prompts) != len(draws):
            raise ValueError("its record of known sequences is cut short")
        if any(score > 0 for score in scores) or not (off is None or (isinstance(off, float) and off >= 0)):
            raise ValueError("a known sequence has no log-probability")
        self._seen = {key: _Seen(step, score) for key, step, score in zip(keys, steps, scores, strict=True)}
        self._draws = Counter(dict(zip(prompts, draws, strict=True)))
        self._recorded_off = off


def _key(sequence: RolloutSequence) -> int:
    return _digest(sequence.prompt_ids, sequence.completion_ids)


def _digest(*parts: Sequence[int]) -> int:
    """64 bits, signed; the same in every process and on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(np.asarray((len(part), *part), dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
