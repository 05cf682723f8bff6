"""A loop of a user's own says that its policy has just drawn a batch: the probe and the watch hold that against the tokens."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import GenerationConfig

from entropy_core import SequenceBatch
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.models.load import load_model_and_tokenizer
from rl_training.probe.watch import EntropyWatch

PROMPTS, EACH, EOS, PAD = [f"{a}+{b}=" for a in range(8) for b in range(8)], 4, 1, 0


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return load_model_and_tokenizer(str(tiny_policy), device="cpu")


def drawn(policy, after_the_end=False, said_temperature=1.0, **settings):
    """Completions by transformers' generate; `after_the_end` counts what fills a row behind its end as drawn."""
    model, tokenizer = policy
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS for _ in range(EACH)]
    settings = {"do_sample": True, "top_k": 0, "temperature": 1.0, "max_new_tokens": 8, **settings}
    config = GenerationConfig(**settings, eos_token_id=EOS, pad_token_id=EOS if after_the_end else PAD)
    torch.manual_seed(0)
    given = torch.tensor(ids)
    with torch.no_grad():
        out = model.generate(given, attention_mask=torch.ones_like(given), generation_config=config)
    rows = out[:, given.shape[1] :].tolist()
    if not after_the_end:
        rows = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
    index = [n // EACH for n in range(len(ids))]
    return SequenceBatch.from_sequences(ids, rows, index, PAD, said_temperature)


CASES = {
    "as drawn": {},
    "at its temperature": {"temperature": 0.7, "said_temperature": 0.7},
    "generate's own top_k": {"top_k": 50},
    "another temperature": {"temperature": 0.7},
    "the end counted often": {"after_the_end": True},
}
RIGHT = ("as drawn", "at its temperature")


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["probe", "no gradient", "watch"])
def test_a_batch_that_the_policy_did_not_draw_is_said_once(policy, kind, case):
    model, batch = policy[0], drawn(policy, **CASES[case])
    probe = SimpleEntropyProbe(EntropyProbeConfig(mode="simple"), model)
    watch = EntropyWatch(EntropyProbeConfig(), model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            if kind == "watch":
                watch.before_step(batch)
            else:
                probe.observe(batch, gradient=kind == "probe")
    said = [str(w.message) for w in caught if "draws from softmax" in str(w.message)]
    assert len(said) == (0 if case in RIGHT else 1), (case, said)


def test_a_batch_of_an_earlier_policy_is_not_held_against_todays(policy):
    model, batch = policy[0], drawn(policy, temperature=0.7)
    scores = torch.zeros(len(batch), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(4):
            SimpleEntropyProbe(EntropyProbeConfig(mode="simple"), model).observe(batch, scores)
            EntropyWatch(EntropyProbeConfig(), model).before_step(batch, scores)
