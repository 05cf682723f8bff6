"""How the probe behaves: it changes nothing, keeps little, says how sure it is, and refuses what it cannot predict."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import ESTIMATORS, score_coefficients
from entropy_core.gradients import batch_gradients, dot, entropy_gradient
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig, LoraConfig
from rl_training.errors import UserError
from rl_training.models.load import add_lora, load_model_and_tokenizer
from rl_training.probe.shares import TrainingSequences
from rl_training.sampling import draw, make_sampling_config
from tests.rl_training.probe_setting import Setting, along, difference, make_probe

ROWS = [{"prompt": f"{i}+{i}=", "prompt_index": i} for i in range(6)]
EVERYTHING = {"preset": "accurate", "predictors": True, "per_completion": True, "mode": "attribution", "averaging": 0.5}


class RealSetting:
    """A small Llama, adapters or all of its weights, with four completions of each of six prompts."""

    def __init__(self, tiny_policy, lora: bool) -> None:
        self.model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
        sampling_config = make_sampling_config(self.model, tokenizer, 1.0, 6)
        self.batch = draw(self.model, tokenizer, ROWS, 4, sampling_config, seed=0, status="evaluation").to_batch(
            sampling_config
        )
        self.model = add_lora(self.model, LoraConfig(r=4)) if lora else self.model.requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.1)
        self.model.train()

    def training(self, seed: int) -> TrainingSequences:
        advantages = torch.randn(len(self.batch), generator=torch.Generator().manual_seed(seed)).double()
        return TrainingSequences(self.batch, advantages, advantages / 100)

    def backward(self, seed: int) -> None:
        self.optimizer.zero_grad()
        weights = self.training(seed).weights
        found = batch_gradients(self.model, self.batch, [score_coefficients(self.batch, -weights)])[0]
        for p, g in zip(self.parameters, found.values(), strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)

    def named(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.fixture(params=[False, True], ids=["full", "lora"])
def real(request: pytest.FixtureRequest, tiny_policy) -> RealSetting:
    setting = RealSetting(tiny_policy, request.param)
    for seed in range(2):  # adapters begin with gradients of zero in one half
        setting.backward(seed)
        setting.optimizer.step()
    return setting


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_transformers_step_is_predicted_by_its_gradient_along_it(real: RealSetting, estimator: str) -> None:
    config = EntropyProbeConfig(mode="simple", preset="accurate", estimator=estimator, averaging=0.0, rollouts="fresh")
    probe = SimpleEntropyProbe(config, real.model)
    gradient, before = entropy_gradient(real.model, real.batch, estimator), real.named()
    probe.observe(real.batch)
    real.backward(2)
    probe.before_step(real.optimizer)
    real.optimizer.step()
    change = probe.after_step()
    wanted = dot(gradient, difference(real.named(), before))
    assert change is not None
    assert change.total.value == pytest.approx(wanted, rel=1e-3), "float32 weights round the step at 1e-4 of it"
    parts = change.batch.value + change.momentum.value + change.decay.value
    assert parts == pytest.approx(change.total.value, rel=1e-6)
    assert change.momentum.value != 0 and change.decay.value != 0 and change.sequences == 24
    assert change.measured is not None and change.measured.before == pytest.approx(change.entropy, rel=1e-6)


# ---------------------------------------------------------------------- nothing of training is touched
def everything_of_training(real: RealSetting) -> list[Tensor]:
    state = [v for p in real.parameters for v in real.optimizer.state[p].values() if isinstance(v, Tensor)]
    return [*real.model.parameters(), *(p.grad for p in real.parameters), *state, torch.get_rng_state()]


def test_no_bit_of_training_changes(real: RealSetting) -> None:
    """Weights, gradients, moments, the random stream, module modes, hooks and graphs: before and after each call."""
    probe = SimpleEntropyProbe(EntropyProbeConfig(**EVERYTHING), real.model)
    real.backward(2)
    modes = [m.training for m in real.model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in real.model.modules())

    def untouched(call, *arguments) -> None:
        kept = [t.clone() for t in everything_of_training(real)]
        call(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(kept, everything_of_training(real), strict=True)), call.__name__
        assert modes == [m.training for m in real.model.modules()], call.__name__
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in real.model.modules())
        assert all(p.grad_fn is None and p.is_leaf for p in real.parameters)

    untouched(probe.statistics, real.batch)
    untouched(probe.compute_delta_h_fast, real.batch, None, real.named())
    untouched(probe.observe, real.batch)
    untouched(probe.before_step, real.optimizer, real.training(2))
    real.optimizer.step()
    untouched(probe.after_step)


def test_training_is_bit_identical_with_and_without(tiny_policy) -> None:
    ends = []
    for watched in (True, False):
        torch.manual_seed(0)
        real = RealSetting(tiny_policy, lora=True)
        probe = SimpleEntropyProbe(EntropyProbeConfig(**EVERYTHING), real.model)
        for seed in range(3):
            if watched:
                probe.observe(real.batch)
            real.backward(seed)
            if watched:
                probe.before_step(real.optimizer, real.training(seed))
            real.optimizer.step()
            assert (probe.after_step() is not None) is watched
        ends.append(everything_of_training(real))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ---------------------------------------------------------------------- memory
class Memory:
    """Bytes that the calls made through it still hold, and the most that they held at a time, by torch's own allocator."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def __call__(self, call, *arguments) -> None:
        gc.collect()  # what earlier tests left behind must not be freed in here
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            call(*arguments)
        events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        for _, change in sorted(events, key=lambda event: event[0]):
            self.held += change
            self.peak = max(self.peak, self.held)


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"standard_error_folds": 0}, marks=pytest.mark.long),
        pytest.param({"predictors": True, "per_completion": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_memory_stays_within_what_is_stated(tiny_policy, config: dict) -> None:
    """Held between calls, and in between while the step is taken apart (no activations there but those of the check of
    derivatives, which is left out; what it holds of the weights' size is in test_vectors_held): all weights are trained.
    """
    real = RealSetting(tiny_policy, lora=False)
    probe = SimpleEntropyProbe(EntropyProbeConfig(**{"mode": "simple", "preset": "accurate", **config}), real.model)
    probe._check.hold = lambda *_: None
    real.backward(0)
    real.optimizer.step()
    size = sum(p.numel() * 4 for p in real.parameters)
    few = size // 10  # token statistics and the like
    folds, gradients = max(1, probe.folds), 3 if config.get("predictors") else 1
    assert probe.memory_bytes() == size * (2 * folds * gradients + 5)
    memory, at_rest = Memory(), []
    for seed in range(1, 4):
        real.backward(seed)
        memory(probe.observe, real.batch)
        assert memory.held >= size * folds * gradients, "the gradient is not where this test looks"
        memory.peak = memory.held
        memory(probe.before_step, real.optimizer)
        assert memory.peak <= probe.memory_bytes() + few
        real.optimizer.step()
        memory(probe.after_step)
        at_rest.append(memory.held)
    assert at_rest[2] == at_rest[1] == at_rest[0], "memory grows from step to step"
    assert at_rest[0] <= size * folds * gradients + few, "more than the running average is kept"
    memory(probe.reset)
    assert memory.held < few, "reset does not free"


def test_after_a_failure_reset_frees_and_the_probe_can_be_used_again(real: RealSetting) -> None:
    probe, memory = (
        SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate", rollouts="fresh"), real.model),
        Memory(),
    )
    size = sum(p.numel() * 4 for p in real.parameters)

    def failing_step() -> None:
        real.model.zero_grad()
        with pytest.raises(UserError, match="no trained parameter has a gradient"):
            probe.before_step(real.optimizer)

    real.backward(2)
    memory(probe.observe, real.batch)
    memory(failing_step)
    assert memory.held > size
    memory(probe.reset)
    assert memory.held < size / 10
    real.backward(2)
    probe.observe(real.batch)
    probe.before_step(real.optimizer)
    real.optimizer.step()
    assert probe.after_step() is not None


def test_without_an_observation_nothing_is_predicted(real: RealSetting) -> None:
    probe = SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate"), real.model)
    real.backward(2)
    probe.before_step(real.optimizer)
    real.optimizer.step()
    assert probe.after_step() is None
    probe.observe(real.batch)
    assert probe.after_step() is None, "observed, but no step was predicted"
    probe.observe(real.batch)
    probe.reset()
    probe.before_step(real.optimizer)
    assert probe.after_step() is None, "reset forgets the observation"


# ---------------------------------------------------------------------- how sure it is
@pytest.mark.parametrize("estimator", ["split", "score_function"])
def test_the_standard_error_is_the_spread_over_independent_batches(estimator: str) -> None:
    """Of the exact policy, 24 prompts a batch. For H the estimator is a mean over prompts, and the error right; for h it is a
    ratio, of whose denominator the error knows nothing: along a step as telling as this one it is too large."""
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    exact = setting.exact()
    setting.backward(3)
    parts = setting.parts_by_hand()
    update = {name: parts["batch"][name] + parts["momentum"][name] for name in parts["batch"]}
    generator = torch.Generator().manual_seed(0)
    probe = make_probe(setting, estimator=estimator, standard_error_folds=8)
    found: list[list[float]] = []
    for _ in range(80):
        rows = torch.multinomial(exact.probabilities, 24, replacement=True, generator=generator)
        batch: SequenceBatch = replace(setting.batch.select(rows), prompt_index=torch.arange(24))
        change = probe.compute_delta_h_fast(batch, None, update)
        assert change.per_completion is not None
        found.append(
            [
                change.total.value,
                change.total.standard_error,
                change.per_completion.total.value,
                change.per_completion.total.standard_error,
            ]
        )
    h, h_error, big_h, big_h_error = torch.tensor(found, dtype=torch.float64).T
    for values, errors, exact_gradient, low, high in (
        (h, h_error, exact.token_entropy_gradient, 0.8, 1.7),
        (big_h, big_h_error, exact.sequence_entropy_gradient, 0.8, 1.2),
    ):
        ratio = float(errors.square().mean().sqrt() / values.std())
        assert low < ratio < high, f"ratio {ratio:.2f}: near {24**0.5:.1f} it is the spread of a summand"
        wanted = along(exact_gradient, update)
        off = abs(float(values.mean()) - wanted) / float(values.std() / 80**0.5)
        assert off < 4, f"the mean over batches is {off:.1f} standard errors from the exact derivative {wanted:.2e}"


def test_no_folds_no_error_the_same_prediction(real: RealSetting) -> None:
    update = {name: torch.randn_like(p) for name, p in real.named().items()}
    changes = [
        SimpleEntropyProbe(
            EntropyProbeConfig(mode="simple", preset="accurate", standard_error_folds=folds), real.model
        ).compute_delta_h_fast(real.batch, None, update)
        for folds in (0, 1, 4, 100)
    ]
    values = torch.tensor([c.total.value for c in changes])
    torch.testing.assert_close(values, values[-1].expand(4), rtol=1e-4, atol=0.0)
    errors = [c.total.standard_error for c in changes]
    assert errors[0] != errors[0] and errors[1] != errors[1] and errors[2] > 0 and errors[3] > 0


# ---------------------------------------------------------------------- layouts
def test_sharing_prefixes_changes_no_prediction(real: RealSetting) -> None:
    update = {name: torch.randn_like(p) for name, p in real.named().items()}
    probe = SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate"), real.model)
    shared = probe.compute_delta_h_fast(real.batch, None, update)
    apart = SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate"), real.model)
    alone = replace(real.batch, prompt_index=torch.arange(24))
    assert len(probe.prefixes.buckets(real.batch)(real.batch)[0].input_ids) == 6, "the tiny Llama shares prefixes"
    assert len(apart.prefixes.buckets(alone)(alone)[0].input_ids) == 24
    assert shared.total.value == pytest.approx(apart.compute_delta_h_fast(alone, None, update).total.value, rel=1e-4)


def test_a_longer_batch_is_tried_anew_before_prefixes_are_shared(tiny_policy) -> None:
    """A sliding window that the first, short batch did not reach."""
    from transformers import MistralConfig, MistralForCausalLM

    shape = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = MistralForCausalLM(MistralConfig(**shape, intermediate_size=16, sliding_window=6, pad_token_id=None)).eval()
    for p in model.parameters():
        p.data.mul_(20.0)

    def batch(prompt: int) -> SequenceBatch:
        prompts = [list(range(1, 1 + prompt))] * 2
        return SequenceBatch.from_sequences(prompts, [[3, 4, 5], [6, 7]], [0, 0], 0)

    probe = SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate"), model)
    exactly = SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate"), model)
    for length, rows in ((2, 1), (3, 1), (12, 2), (2, 2)):
        found = batch(length)
        assert len(probe.prefixes.buckets(found)(found)[0].input_ids) == rows, f"a prompt of {length} tokens"
        apart = replace(found, prompt_index=torch.arange(2))
        torch.testing.assert_close(
            probe.statistics(found).logprobs, exactly.statistics(apart).logprobs, rtol=1e-4, atol=1e-4
        )
    lone = SimpleEntropyProbe(EntropyProbeConfig(mode="simple", preset="accurate"), model)
    assert len(lone.prefixes.buckets(batch(2))(batch(2))[0].input_ids) == 1
    long = replace(batch(12), prompt_index=torch.arange(2))
    assert lone.prefixes.buckets(long)(long)[0].attention_mask is None, "a long batch without company was never tried"


def test_the_loop_written_by_hand_runs(tiny_policy, capsys) -> None:
    spec = importlib.util.spec_from_file_location("torch_loop_with_probe", Path("examples/torch_loop_with_probe.py"))
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(tiny_policy), 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and all("predicted" in line and "measured" in line and "nan" not in line for line in lines)
