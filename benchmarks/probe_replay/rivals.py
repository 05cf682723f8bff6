"""Cheap rivals of the probe, each a series over a recorded run. A: advantages in the loss; lr: learning rate; k: trained tokens.

    persistence     dh of the step before, as it truly was (which no user knows)
    entropy slope   least-squares slope of the logged h over the last five steps, this one's included, of its own sequences
    covariance      -lr Cov_k(log pi, pi A); natural: -lr Cov_k(log pi, A)                            Cui et al. 2025, 2505.22617
    S*              -lr mean_k A [S_k - sum_a pi_a S_a],  S_a = pi_a (log pi_a + H)                   2602.03392, theorem 3.3
    STEER           -lr mean_k A pi (1 - pi)(log pi + H)                                              Hao et al. 2025, 2510.10150
    REPO            -lr mean_k A (log pi_k + H_k)                                                     2603.11682
    score function  the score-function gradient of entropy along the step
    no momentum     Rao-Blackwell along the batch's part of the step alone

S* is the exact first-order change of one context's entropy when its logits move by lr A (e_a - pi). Entropy polarity
(2605.11775: a sampled-token part and a correction over the distribution) and STARE (2606.19236: advantage times a sensitivity of
the next-token distribution) name the same derivative as far as their abstracts say, so they share its row; what the papers add
(reweighting by quantiles, gates on a target entropy) are interventions, not predictions. REPO's is the covariance within each
context, Cui's pools contexts. All but the last two are steps in logits: their correlation means something, slope and sum do not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.probe_replay.estimators import Estimator, contributions
from benchmarks.probe_replay.schedules import Series
from benchmarks.probe_replay.tape import Estimated, Sequences, Tape, ratio
from entropy_core.predictors import covariance_predictor, steer_predictor, steer_token_changes

SLOPE_STEPS = 5
NAN = float("nan")


def persistence(tape: Tape) -> Series:
    return [None, *tape.truth[:-1]]


def entropy_slope(tape: Tape) -> Series:
    levels = np.array([step.own.h for step in tape.steps])
    out: Series = []
    for t in range(len(levels)):
        seen = levels[max(0, t + 1 - SLOPE_STEPS) : t + 1]
        out.append(Estimated(float(np.polyfit(range(len(seen)), seen, 1)[0]), NAN) if len(seen) > 1 else None)
    return out


def discriminator_tokens(s: Sequences) -> Tensor:
    """(N, T) -A [S_k - sum_a pi_a S_a], 0 behind completions: `sharpness` is sum_a pi_a^2 (log pi_a + H)."""
    own = s.logprob.exp() * (s.logprob + s.entropy)
    return -s.extra["advantage"][:, None] * (own - s.extra["sharpness"]) * s.mask


def repo_tokens(s: Sequences) -> Tensor:
    """(N, T) -A (log pi_k + H_k), 0 behind completions."""
    return -s.extra["advantage"][:, None] * (s.logprob + s.entropy) * s.mask


def _covariances(s: Sequences) -> Tensor:
    """(N, T) (log pi - mean)(A - mean), means over completion tokens: Clip-Cov and KL-Cov choose tokens by these."""
    a = s.extra["advantage"][:, None].expand_as(s.logprob)
    return (s.logprob - s.logprob[s.mask].mean()) * (a - a[s.mask].mean()) * s.mask


def token_rivals(s: Sequences, rate: float) -> dict[str, float]:
    """The rivals that need token statistics of the trained sequences alone. rate: learning rate."""
    a, tokens = s.extra["advantage"], float(s.mask.sum())
    return {
        "covariance": covariance_predictor(s.logprob, s.mask, a, rate),
        "covariance, natural": covariance_predictor(s.logprob, s.mask, a, rate, natural_gradient=True),
        "S*": rate * float(discriminator_tokens(s).sum()) / tokens,
        "STEER": steer_predictor(s.logprob, s.entropy, s.mask, a, rate),
        "REPO": rate * float(repo_tokens(s).sum()) / tokens,
    }


def token_rival_series(tape: Tape) -> dict[str, Series]:
    """`token_rivals` of every step."""
    found = [token_rivals(step.own, step.numbers["learning_rate"]) for step in tape.steps]
    return {name: [Estimated(values[name], NAN) for values in found] for name in found[0]}


def without_momentum(tape: Tape) -> Series:
    out: Series = []
    for step in tape.steps:
        s = step.own
        assert s.entropy_along is not None and s.logprob_along is not None
        changes = s.entropy_along[..., 0], s.logprob_along[..., 0]
        x = contributions(Estimator("along", "without_own"), s, changes=changes)
        out.append(ratio(s.omega * x, s.omega * s.length, s.prompt))
    return out


def token_r_squared(tape: Tape) -> dict[str, float]:
    """Mean over steps of the squared correlation, over trained tokens, of each rival with attribution by token (`own_share`)."""
    found: dict[str, list[float]] = {}
    for step in tape.steps:
        s = step.own
        trained = s.mask & (s.extra["weight"] != 0)[:, None]
        if "share" not in s.extra or int(trained.sum()) < 10:
            continue
        a = s.extra["advantage"]
        tokens = {
            "covariance, natural": -_covariances(s),
            "S*": discriminator_tokens(s),
            "STEER": steer_token_changes(s.logprob, s.entropy, s.mask, a, 1.0),
            "REPO": repo_tokens(s),
        }
        for name, values in tokens.items():
            pair = torch.stack([values[trained], s.extra["share"][trained]])
            found.setdefault(name, []).append(float(torch.corrcoef(pair)[0, 1].square().nan_to_num()))
    return {name: float(np.mean(values)) for name, values in found.items()}
