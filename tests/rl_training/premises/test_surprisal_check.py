"""The running check of the sampler: exact sums, its rate of false alarms, and samplers that no name gives away."""

import math
import warnings

import pytest
import torch
from transformers import LlamaConfig

from entropy_core.scores import token_statistics
from rl_training.config import EntropyProbeConfig
from rl_training.generation.rollout_sequences import to_batch
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.premises.surprisal_check import SamplerWatch
from rl_training.probe.surprisal import FALSE_ALARMS, SurprisalCheck, surprisal_sums
from rl_training.sampling import SamplingConfig, generate_completions
from rl_training.sequences import RolloutSequence
from tests.rl_training.sampling_setting import make_trainer, tiny_model, vocabulary

SAMPLING = SamplingConfig(1.0, 6, (1,), 0)


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return tiny_model(config).requires_grad_(True)


def test_the_inequality_behind_the_bound_holds():
    """exp(x - x^2/6) <= 1 + x + x^2/3 for every real x: with it the product over tokens is a supermartingale."""
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    assert bool((torch.exp(x - x.square() / 6) <= (1 + x + x.square() / 3) * (1 + 1e-12) + 1e-12).all())


def test_sums_are_those_of_the_distribution(model):
    prompts = [[4, 5, 6], [7, 8, 9, 10]] * 20
    drawn = generate_completions(model, prompts, SAMPLING, seed=1)
    batch = to_batch([RolloutSequence(tuple(p), tuple(c)) for p, c in zip(prompts, drawn, strict=True)], SAMPLING)
    difference, variance, tokens = surprisal_sums(token_statistics(model, batch, with_variances=True), batch).tolist()
    wanted = [0.0, 0.0]
    with torch.no_grad():
        for prompt, completion in zip(prompts, drawn, strict=True):
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
            logp = logits.log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1)
            x = -logp[range(len(completion)), completion] - entropy
            spread = (logp.exp() * logp.square()).sum(-1) - entropy.square()
            wanted[0] += float(x.sum())
            wanted[1] += float((x.square() / 3 + 2 * spread / 3).sum())
    assert tokens == sum(map(len, drawn))
    assert difference == pytest.approx(wanted[0], abs=1e-3) and variance == pytest.approx(wanted[1], rel=1e-4)


@pytest.mark.parametrize("peak", [0.3, 0.9, 0.999])
def test_a_run_of_any_length_is_rarely_alarmed_without_reason(peak):
    """4,000 runs of 400 looks at a policy with that much mass on one token: skewed, where a normal limit would fail."""
    generator = torch.Generator().manual_seed(0)
    p = torch.full((10,), (1 - peak) / 9, dtype=torch.float64)
    p[0] = peak
    entropy = -(p * p.log()).sum()
    spread = (p * p.log().square()).sum() - entropy**2
    tokens = p.multinomial(4000 * 400, replacement=True, generator=generator).view(4000, 400)
    x = -p.log()[tokens] - entropy
    total, variance = x.cumsum(1), (x.square() / 3 + 2 * spread / 3).cumsum(1)
    alarmed = 0
    for run in range(4000):
        # `limit` grows with the variance: looking where |M| is largest against it suffices.
        worst = int((total[run].square() / (variance[run] + 30)).argmax())
        alarmed += SurprisalCheck(float(total[run, worst]), float(variance[run, worst]), worst + 1).alarmed
    assert alarmed <= 4000 * FALSE_ALARMS + 4 * math.sqrt(4000 * FALSE_ALARMS)


@pytest.mark.parametrize("sampler", ["top 5", "colder", "hotter", "greedy", "two tokens forbidden"])
def test_another_sampler_is_found_without_a_name(model, sampler):
    """Tokens of single steps drawn by hand; 24 draws of 40 tokens each."""
    generator = torch.Generator().manual_seed(3)
    contexts = torch.randint(3, vocabulary(), (40, 4), generator=generator)
    with torch.no_grad():
        logits = model(contexts).logits[:, -1].double()
    logp = logits.log_softmax(-1)
    other = {
        "top 5": logits.masked_fill(logits < logits.topk(5).values[:, -1:], -math.inf),
        "colder": logits / 0.5,
        "hotter": logits / 1.5,
        "greedy": logits * 1e4,
        "two tokens forbidden": logits.scatter(1, logits.topk(2).indices, -math.inf),
    }[sampler]
    check, honest = SurprisalCheck(), SurprisalCheck()
    entropy = -(logp.exp() * logp).sum(-1)
    spread = (logp.exp() * logp.square()).sum(-1) - entropy.square()
    for _ in range(24):
        for which, distribution in ((check, other), (honest, logits)):
            drawn = distribution.softmax(-1).multinomial(1, generator=generator)
            x = -logp.gather(1, drawn)[:, 0] - entropy
            which.add(float(x.sum()), float((x.square() / 3 + 2 * spread / 3).sum()), 40)
    assert check.alarmed and not honest.alarmed
    assert ("less likely" if sampler in ("hotter", "two tokens forbidden") else "likelier") in check.sentence()


def attached(model, folder, steps, probe, **settings):
    trainer = make_trainer(model, folder, max_steps=steps, **settings)
    config = EntropyProbeConfig(**{"on_error": "raise", "mode": "simple", "preset": "accurate", **probe})
    return trainer, attach_entropy_probe(trainer, config, console=False)


def test_what_the_probe_watches_is_looked_at_without_a_pass_more(model, tmp_path, monkeypatch):
    passes, watched = [], []
    original = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: passes.append(1) or original(self, *a, **k))
    counts = []
    for looking in (True, False):
        passes.clear()
        trainer, callback = attached(model, tmp_path, 3, {"eval_sequences": 8}, learning_rate=0.0)
        if not looking:
            monkeypatch.setattr(SamplerWatch, "wanted", property(lambda self: False))
        observe = callback._probe.observe

        def noting(batch, *rest, observe=observe, looking=looking, **named):
            watched.extend([batch] if looking else [])
            return observe(batch, *rest, **named)

        callback._probe.observe = noting
        trainer.train()
        counts.append(len(passes))
        if looking:
            found = callback._sampler.check
    assert counts[0] == counts[1], "forward passes with the check and without"
    sums = [surprisal_sums(token_statistics(model, batch, with_variances=True), batch) for batch in watched]
    difference, variance, tokens = torch.stack(sums).sum(0).tolist()
    assert len(watched) == 3 and found.tokens == tokens > 0
    assert found.difference == pytest.approx(difference, abs=1e-3) and found.variance == pytest.approx(
        variance, rel=1e-4
    )


@pytest.mark.parametrize("rollouts", ["fresh", "previous_step"])
def test_where_the_probe_watches_other_sequences_passes_of_its_own_become_rarer(model, tmp_path, monkeypatch, rollouts):
    looked = []
    original = SamplerWatch.take
    monkeypatch.setattr(
        SamplerWatch,
        "take",
        lambda self, statistics, batch: (
            looked.append((self._trainer.state.global_step + 1, len(batch))) or original(self, statistics, batch)
        ),
    )
    trainer, callback = attached(model, tmp_path, 5, {"rollouts": rollouts, "eval_sequences": 4})
    trainer.train()
    assert looked == [(1, 16), (2, 16), (4, 16)] and callback._sampler.check.tokens > 0


def run(model, folder, **settings):
    trainer = make_trainer(model, folder, max_steps=4, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_entropy_probe(trainer, EntropyProbeConfig(mode="simple", on_error="raise"), console=False)
        trainer.train()
    return [str(w.message) for w in caught if "(z = " in str(w.message)]


def test_a_patched_sampler_is_found_by_what_it_draws(model, tmp_path, monkeypatch):
    """No setting tells of it: the logits are halved in temperature on their way to the draw."""
    assert run(model, tmp_path) == []
    original = type(model)._get_logits_processor

    def colder(self, *args, **kwargs):
        from transformers import TemperatureLogitsWarper

        return [*original(self, *args, **kwargs), TemperatureLogitsWarper(0.4)]

    from transformers import LogitsProcessorList

    monkeypatch.setattr(
        type(model), "_get_logits_processor", lambda self, *a, **k: LogitsProcessorList(colder(self, *a, **k))
    )
    told = run(model, tmp_path)
    assert len(told) == 1 and "likelier" in told[0]


def test_reused_rollouts_are_no_other_sampler(model, tmp_path):
    """With a large step the second iteration's policy is another than the one that drew."""
    assert run(model, tmp_path, num_iterations=2, learning_rate=0.05) == []
