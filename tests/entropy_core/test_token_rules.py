"""Rules by token and weights by sign against plain autograd of the losses that their papers write."""

from __future__ import annotations

import torch

from entropy_core.token_rules import REPO_ZETA
from tests.entropy_experiments.analyses.test_prices import (
    assert_same,
    autograd_of,
    gradient,
    listed,
    tiny,
    token_values,
    training_tokens,
)


def test_stare_raises_rare_tokens_of_rewarded_sequences():
    """Luo et al. 2026: the surrogate of each token times its factor, 1.1 on the tenth of highest surprisal where A > 0."""
    step = tiny()
    tokens, (logprob, _, mask) = training_tokens(step), token_values(step)
    positive = mask & (tokens.advantages > 0)[:, None]
    negative = mask & (tokens.advantages < 0)[:, None]

    def rare(among):
        surprisal = torch.where(among, -logprob.detach(), -torch.inf).flatten()
        chosen = torch.zeros_like(surprisal, dtype=torch.bool)
        chosen[surprisal.argsort(descending=True)[: round(0.1 * int(among.sum()))]] = True
        return chosen.view(mask.shape)

    factor = torch.ones(mask.shape, dtype=torch.float64)
    factor[rare(positive)] = 1.1
    found = listed(tokens)
    assert_same(
        gradient(step, found["stare"]), autograd_of(step, (factor * tokens.weights[:, None] * logprob * mask).sum())
    )
    factor[rare(negative)] = 0.9
    logprob = token_values(step)[0]
    assert_same(
        gradient(step, found["stare_two_sided"]),
        autograd_of(step, (factor * tokens.weights[:, None] * logprob * mask).sum()),
    )


def test_repo_rescales_advantages_by_the_centred_log_probability():
    """Petrenko et al. 2026, REPO-R: A (1 - zeta L) where A > 0, A (1 + zeta L) where A < 0, of its own sign."""
    step = tiny()
    tokens, (logprob, entropy, mask) = training_tokens(step), token_values(step)
    centred = (logprob + entropy).detach()
    advantage = tokens.weights[:, None].expand(mask.shape)
    up, down = advantage * (1 - REPO_ZETA * centred), advantage * (1 + REPO_ZETA * centred)
    rescaled = torch.where(advantage > 0, up.clamp(min=0), down.clamp(max=0))
    assert float((rescaled - advantage).abs().max()) > 0.01 * float(advantage.abs().max())
    assert_same(gradient(step, listed(tokens)["repo_r"]), autograd_of(step, (rescaled * logprob * mask).sum()))


def test_weights_of_one_sign_are_scaled_as_named():
    step = tiny()
    tokens = training_tokens(step)
    found, w = listed(tokens), tokens.weights
    for name, wanted in (
        ("positives_0.1", torch.where(w > 0, 0.1 * w, w)),
        ("negatives_0.5", torch.where(w < 0, 0.5 * w, w)),
        ("truncated", torch.where(tokens.truncated, 0.5 * w, w)),
    ):
        assert torch.equal(found[name].objective, wanted), name
