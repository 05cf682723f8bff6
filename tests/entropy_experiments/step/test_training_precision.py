"""What rounding in training changes, against torch's own passes and optimizer in that precision."""

from copy import copy

import pytest
import torch

from entropy_core.adamw import AdamWParameterState
from entropy_core.batch import SequenceBatch
from entropy_core.formed import dot
from entropy_core.gradients import entropy_gradient, trainable_parameters
from entropy_core.passes.settings import PassSettings
from entropy_experiments.analyses.precision_in_training import as_saved
from entropy_experiments.checkpoint_loader import load_as_configured, load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console.analyze import analyze_with_progress
from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.step import training_precision as training_module
from entropy_experiments.step.optimizer_step import take_next_step, taken_step
from entropy_experiments.step.training_precision import (
    TrainedIn,
    passes_as_in_training,
    policy_rounding,
    step_rounding,
    training_precision,
)
from rl_training.configuration import load_config
from rl_training.errors import UserError
from rl_training.models.load import load_model_and_tokenizer
from rl_training.train import run_training
from tests.entropy_experiments.small_analysis import config
from tests.shared_artefacts import made_once
from tests.tiny_policy import save_tiny_policy, tiny_train_config

PASSES = PassSettings(512)
BFLOAT16 = TrainedIn("bfloat16", "no")


def trained(root, **sections):
    policy = save_tiny_policy(root / "policy")
    model = {"name": str(policy), "device": "cpu", "dtype": "bfloat16"}
    quiet = {"entropy_probe": {"enabled": False}, "training": {"steps": 2, "save_every": 2}}
    return run_training(tiny_train_config(policy, root / "run", model=model, **quiet, **sections), quiet=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """All weights trained in bfloat16, and so the moments."""
    return made_once(tmp_path_factory, "bfloat16-whole", lambda root: trained(root, lora={"enabled": False}))


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    """A float32 adapter on a base model that is saved in float32 and was loaded in bfloat16."""
    return made_once(tmp_path_factory, "bfloat16-adapter", trained)


@pytest.fixture(scope="module")
def checkpoint(whole_run):
    return load_as_configured(whole_run / "checkpoint-2", FisherAnalysisConfig(), "cpu")


@pytest.fixture(scope="module")
def few():
    """Four sequences of six and five tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 40, (4, 11), generator=generator).tolist()
    return SequenceBatch.from_sequences([t[:6] for t in tokens], [t[6:] for t in tokens], list(range(4)), 0, 1.0)


def test_a_run_below_float32_is_analysed_in_float32_with_its_own_weights(whole_run, adapter_run, checkpoint):
    for run in (whole_run, adapter_run):
        as_trained = load_checkpoint(run / "checkpoint-2", device="cpu").model
        assert any(p.dtype == torch.bfloat16 for p in as_trained.parameters())
        widened = load_as_configured(run / "checkpoint-2", FisherAnalysisConfig(), "cpu").model
        found = dict(widened.named_parameters())
        assert {p.dtype for p in found.values()} == {torch.float32}
        assert all(torch.equal(p.float(), found[name]) for name, p in as_trained.named_parameters())
    asked = load_checkpoint(adapter_run / "checkpoint-2", device="cpu", dtype="float64").model
    assert {p.dtype for p in asked.parameters()} == {torch.float64}
    base = [p for name, p in asked.named_parameters() if "lora_" not in name]
    assert all(torch.equal(p, p.to(torch.bfloat16).double()) for p in base)


def test_a_base_model_that_a_device_map_cannot_round_is_refused_where_it_has_more_digits(adapter_run, tmp_path):
    placed = load_config(FisherAnalysisConfig, None, ["checkpoint.device_map={'': cpu}"])
    with pytest.raises(UserError, match="trained on its base model in bfloat16, and .* is saved with more digits"):
        load_as_configured(adapter_run / "checkpoint-2", placed)
    base, tokenizer = load_model_and_tokenizer(str(adapter_run.parent / "policy"), "bfloat16", device="cpu")
    base.save_pretrained(tmp_path / "rounded")
    tokenizer.save_pretrained(tmp_path / "rounded")
    rounded = placed.model_copy(
        update={"checkpoint": placed.checkpoint.model_copy(update={"model": str(tmp_path / "rounded")})}
    )
    found = load_as_configured(adapter_run / "checkpoint-2", rounded).model
    assert {p.dtype for p in found.parameters()} == {torch.float32}


def test_the_rounded_step_is_that_of_torchs_optimizer_in_half_precision(whole_run, checkpoint, few):
    gradient = entropy_gradient(checkpoint.model, few)
    loss = {name: 0.3 * g for name, g in gradient.items()}
    step = take_next_step(checkpoint.model, checkpoint.optimizer, loss, 0.5)
    found = step_rounding(step, gradient, checkpoint.optimizer.stored_types())

    half = load_checkpoint(whole_run / "checkpoint-2", device="cpu").model
    parameters = trainable_parameters(half)
    saved = torch.load(whole_run / "checkpoint-2" / "optimizer.pt", weights_only=True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, foreach=False)
    names = [name for group in checkpoint.record.sidecar.optimizer_parameter_names for name in group]
    group = saved["param_groups"][0]
    for name, number in zip(names, [n for g in saved["param_groups"] for n in g["params"]], strict=True):
        optimizer.state[parameters[name]] = saved["state"][number]
        parameters[name].grad = (loss[name] * step.clip).bfloat16()
    optimizer.param_groups[0].update(
        {key: group[key] for key in ("betas", "eps", "weight_decay")}, lr=checkpoint.record.learning_rates[0]
    )
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step()
    taken = {name: (p.detach() - before[name]).float() for name, p in parameters.items()}
    moved = sum(int(d.count_nonzero()) for d in taken.values()) / sum(p.numel() for p in parameters.values())
    assert (found.weights, found.moments) == ("bfloat16", "bfloat16")
    assert found.predicted_in_training == pytest.approx(dot(gradient, taken), rel=1e-6)
    assert found.moved == pytest.approx(moved, rel=0.02) and 0 < found.moved < 1
    assert abs(found.length - 1) > 1e-3


def test_moments_in_half_precision_beside_finer_weights(checkpoint, few):
    gradient = entropy_gradient(checkpoint.model, few)
    step = take_next_step(checkpoint.model, checkpoint.optimizer, gradient, None)
    mixed = {name: (torch.bfloat16, torch.float32) for name in gradient}
    found = step_rounding(step, gradient, mixed)
    expected = {}
    for name, g in gradient.items():
        s, theta = step.state[name], step.parameters[name].detach()
        t = s.step + 1
        m = (s.beta1 * s.exp_avg + (1 - s.beta1) * g).bfloat16().float()
        v = s.beta2 * s.exp_avg_sq + (1 - s.beta2) * g**2
        moved = (m / (1 - s.beta1**t)) / ((v / (1 - s.beta2**t)).sqrt() + s.eps)
        expected[name] = -s.lr * moved - s.lr * s.weight_decay * theta
    assert (found.weights, found.moments) == ("float32", "bfloat16")
    assert found.predicted_in_training == pytest.approx(dot(gradient, expected), rel=1e-4)
    assert found.predicted == pytest.approx(dot(gradient, step.parameter_delta), rel=1e-6)
    assert step_rounding(step, gradient, dict.fromkeys(gradient, (torch.float32, torch.float32))) is None


def test_passes_are_those_of_training_and_weights_come_back(whole_run, checkpoint, few):
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in checkpoint.model.named_parameters()}
    found = policy_rounding(checkpoint.model, few, "rao_blackwell", None, BFLOAT16, PASSES)
    for name, parameter in checkpoint.model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    half = load_checkpoint(whole_run / "checkpoint-2", device="cpu").model
    differences = []
    for row in range(len(few)):
        sequence = few.input_ids[row][few.input_ids[row] != 0]
        scored = [m(sequence[None]).logits[0, 5:-1].float().log_softmax(-1) for m in (half, checkpoint.model)]
        taken = [s.gather(1, sequence[6:, None])[:, 0].double() for s in scored]
        differences.append(taken[0] - taken[1])
    expected = torch.cat(differences).square().mean().sqrt()
    # Two computations in bfloat16 differ by the order of their sums: a batch is not its sequences one by one.
    assert found.logprob == pytest.approx(expected.item(), rel=0.2) and found.logprob > 1e-4
    assert 1e-4 < found.gradient < 0.2 and (found.sequences, found.tokens) == (4, 20)


def test_mixed_precision_is_autocast(checkpoint, few):
    found = policy_rounding(checkpoint.model, few, "rao_blackwell", None, TrainedIn("float32", "bf16"), PASSES)
    assert found.logprob > 1e-4 and found.gradient > 1e-4
    with passes_as_in_training(checkpoint.model, TrainedIn("float32", "bf16")):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    same = training_precision(
        checkpoint.model, None, few, "rao_blackwell", {}, None, TrainedIn("float32", "no"), PASSES
    )
    assert same is None


def test_without_a_record_the_weights_themselves_tell(whole_run, adapter_run, checkpoint):
    finest = TrainedIn("float32", "no")
    assert as_saved(load_checkpoint(whole_run / "checkpoint-2", device="cpu", widened=True).model) == BFLOAT16
    assert as_saved(checkpoint.model, checkpoint.optimizer) == BFLOAT16
    adapter = load_checkpoint(adapter_run / "checkpoint-2", device="cpu")
    assert as_saved(adapter.model) == as_saved(adapter.model, adapter.optimizer) == finest
    assert as_saved(checkpoint.model, with_moments(checkpoint.optimizer, torch.float32)) == finest, "moments say finer"
    half = load_checkpoint(adapter_run / "checkpoint-2", device="cpu", widened=True)
    for p in trainable_parameters(half.model).values():
        p.data = p.data.bfloat16().float()
    assert as_saved(half.model, with_moments(half.optimizer, torch.bfloat16)) == BFLOAT16
    with torch.random.fork_rng():
        assert as_saved(torch.nn.Linear(3, 3)) == finest


def with_moments(optimizer, dtype):
    """The same, as if its file held them in `dtype`."""
    found = copy(optimizer)
    types = dict.fromkeys(optimizer, (dtype, dtype))
    found.stored_types = lambda: types
    return found


def test_finer_weights_are_told_by_finer_moments(checkpoint, few):
    moments = with_moments(checkpoint.optimizer, torch.float32)

    def found(trained_in=BFLOAT16, optimizer=moments):
        return training_precision(checkpoint.model, optimizer, few, "rao_blackwell", {}, None, trained_in, PASSES)

    assert found().finer_weights == "rounded" and found(TrainedIn("float32", "no")).finer_weights == "rounded"
    assert found(optimizer=None).finer_weights is found(optimizer=checkpoint.optimizer).finer_weights is None
    weight = next(p for p in checkpoint.model.parameters() if p.dim() > 1)
    kept = weight.data
    weight.data = kept + 1e-5
    try:
        assert found().finer_weights == "stored" and found(TrainedIn("float32", "no")) is None
    finally:
        weight.data = kept


def test_what_was_not_looked_at_is_said(adapter_run, checkpoint, few, monkeypatch):
    finest = TrainedIn("float32", "no")

    def found(trained_in, batch=few, optimizer=None, recorded=True):
        arguments = (checkpoint.model, optimizer, batch, "rao_blackwell", {}, None, trained_in, PASSES)
        return training_precision(*arguments, recorded=recorded)

    assert found(finest) is None and found(finest, recorded=False).not_compared == "not_recorded"
    assert found(BFLOAT16, recorded=False).not_compared is None
    assert found(BFLOAT16, few.select([0])).not_compared == "few_sequences"
    adapter = load_as_configured(adapter_run / "checkpoint-2", FisherAnalysisConfig(), "cpu").model
    adapter.get_input_embeddings().to("meta")
    offloaded = training_precision(adapter, None, few, "rao_blackwell", {}, None, BFLOAT16, PASSES)
    assert (offloaded.policy, offloaded.not_compared) == (None, "offloaded")
    monkeypatch.setattr(training_module, "open_cut", lambda model: "a cut")
    assert found(finest) is None
    for said in (found(BFLOAT16), found(finest, recorded=False), found(finest, optimizer=checkpoint.optimizer)):
        assert (said.policy, said.not_compared) == (None, "cut")


def test_adapters_that_are_trained_in_half_precision_pass_so_on_a_finer_base(adapter_run, few):
    model = load_as_configured(adapter_run / "checkpoint-2", FisherAnalysisConfig(), "cpu").model
    trained = trainable_parameters(model)
    kept = dict.fromkeys(trained, torch.bfloat16)
    for p in trained.values():
        p.data = p.data.bfloat16().float()
    with passes_as_in_training(model, TrainedIn("float32", "no"), kept):
        types = {name: p.dtype for name, p in model.named_parameters()}
    assert types == {n: torch.bfloat16 if n in trained else torch.float32 for n in types}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert policy_rounding(model, few, "rao_blackwell", None, TrainedIn("float32", "no"), PASSES, kept).logprob > 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_in_half_precision_is_by_the_runs_own_kernel(fused):
    """In float16 torch's plain kernel loses eps and the small second moments; the fused one computes in float32."""
    generator = torch.Generator().manual_seed(0)
    theta, g, m = (s * torch.randn(500, generator=generator) for s in (0.1, 1e-3, 1e-3))
    weight = torch.nn.Parameter(theta.half())
    weight.grad, m, v = g.half(), m.half(), torch.rand(500, generator=generator).mul(1e-6).half()
    state = AdamWParameterState(m, v, 5, 1e-3, 0.9, 0.999, 1e-8, 0.01, fused=fused)
    found = taken_step(state, weight.grad, weight, torch.float16)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.01, fused=fused)
    optimizer.state[weight] = {"step": torch.tensor(5.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(found, weight.detach() - before, rtol=0, atol=0, equal_nan=True)
    assert bool(found.isfinite().all()) == fused


def test_an_analysis_says_it(adapter_run, tmp_path, capsys):
    analysis = analyze_with_progress(adapter_run, config(), folder=tmp_path / "results")
    assert "- The run had weights in bfloat16; numbers here are without" in capsys.readouterr().err
    assert not analysis.failed_checks
    found = read_results_folder(tmp_path / "results").summary.training_precision
    assert (found.weights, found.autocast, found.step) == ("bfloat16", "no", None)
    assert found.policy.sequences == 16 and found.policy.logprob > 1e-4
    assert "The run had weights in bfloat16" in (tmp_path / "results" / "report.html").read_text()
