"""Whether completions come from the distribution that they are scored by, judged from the completions
alone.

    x_k = -log pi(a_k | c_k) - H(c_k) ,        E[x_k | c_k] = 0  where a_k ~ pi(. | c_k) ,
    M = sum of x over all tokens so far ,      V = (1/3) sum x^2 + (2/3) sum Var[log pi | c_k] ,
    P( |M| >= sqrt((V + r) (log((V + r) / r) + 2 log(1 / alpha)))  at any time )  <=  alpha .

Surprisal and entropy have the same mean where a_k is drawn from pi: a truncated, penalised, colder
or otherwise altered sampler shifts one against the other, whatever its name. M is a martingale over
the tokens of all steps. As exp(x - x^2/6) is at most 1 + x + x^2/3 for every real x, exp(l M - l^2
V / 2) is a supermartingale for every l, whatever the size and the symmetry of x (Delyon 2009,
"Exponential inequalities for sums of weakly dependent variables"). Mixed over l ~ N(0, 1/r) it
bounds M at all times at once (Ville's inequality), so that looking at every step costs nothing: the
chance that a run of any length is alarmed without reason is at most alpha. r is where the bound is
tightest, in nats^2.

Source: docs/theory/double-sampling.md.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics

FALSE_ALARMS = 5e-4
TIGHTEST = 30.0


@dataclass
class SurprisalCheck:
    """Adds up tokens over the steps of a run. All sums in nats or nats^2, float64."""

    difference: float = 0.0
    variance: float = 0.0
    tokens: int = 0

    def add(self, difference: float, variance: float, tokens: int) -> None:
        """Take in a step's sums, e.g. those of several processes added up; see `surprisal_sums`."""
        self.difference += difference
        self.variance += variance
        self.tokens += tokens

    def limit(self) -> float:
        """What |difference| stays below at all times, with probability 1 - FALSE_ALARMS."""
        whole = self.variance + TIGHTEST
        return math.sqrt(whole * (math.log(whole / TIGHTEST) + 2 * math.log(1 / FALSE_ALARMS)))

    @property
    def z(self) -> float:
        """The difference in standard deviations."""
        return self.difference / math.sqrt(self.variance) if self.variance > 0 else 0.0

    @property
    def alarmed(self) -> bool:
        """Whether the tokens seen so far do not come from the distribution that they are scored by."""
        return abs(self.difference) >= self.limit()

    def sentence(self) -> str:
        """For a warning: what was found, and what it does to the numbers."""
        each = self.difference / max(1, self.tokens)
        side = "likelier" if each < 0 else "less likely"
        return (
            f"completions are {side} than draws from softmax(logits / temperature) are: their surprisal and the entropy differ "
            f"by {each:+.3f} nats per token over {self.tokens} tokens (z = {self.z:+.1f}). The sampler is another (truncated, "
            "penalised, another temperature, engine or precision), or only some of what was drawn is trained on, or an earlier "
            "policy drew it: predicted and measured changes are those of the softmax, and can have the opposite sign"
        )


def surprisal_sums(statistics: TokenStatistics, batch: SequenceBatch) -> torch.Tensor:
    """(3,) float64 of sequences drawn by the policy of `statistics`: sums of x, of x^2/3 + 2 Var/3,
    and tokens.

    Args:
        statistics: with `surprisal_variances`. Add such sums up over steps and processes.
    """
    assert statistics.surprisal_variances is not None
    mask = batch.completion_mask.double()
    x = (-statistics.logprobs.double() - statistics.entropies.double()) * mask
    variance = statistics.surprisal_variances.double().clamp(min=0) * mask
    return torch.stack([x.sum(), (x.square() / 3 + 2 * variance / 3).sum(), mask.sum()]).to(torch.float64)


class DrawnSequences:
    """Runs the check on the sequences that a loop of a user's own says its policy has just drawn, and warns once.

    Args:
        off: nothing is looked at (a trainer's sequences are looked at elsewhere).
    """

    def __init__(self, off: bool = False) -> None:
        self._off, self._check = off, SurprisalCheck()

    def wants(self, log_weights: Tensor | None) -> bool:
        """Whether variances of surprisal are to be had of a batch. log_weights: None where today's policy drew it."""
        return not self._off and log_weights is None

    def take(self, statistics: TokenStatistics, batch: SequenceBatch) -> None:
        """Take in a batch that today's policy drew; without `surprisal_variances` it is passed over."""
        if self._off or statistics.surprisal_variances is None:
            return
        difference, variance, tokens = surprisal_sums(statistics, batch).tolist()
        self._check.add(difference, variance, int(tokens))
        if self._check.alarmed:
            self._off = True
            warnings.warn(
                f"the entropy probe: {self._check.sentence()}. Draw with top_k=0, top_p=1 and no other setting (transformers' "
                "generate cuts at top_k=50 by itself), give the batch its temperature, count tokens up to the first "
                "end-of-sequence token, watch what was drawn before it is filtered, and give drawn_scores of an earlier policy's",
                RuntimeWarning,
                stacklevel=3,
            )
