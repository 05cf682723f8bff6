"""The probe without any trainer: a model, a batch, torch's AdamW."""

import copy

import pytest
import torch

from entropy_core.adamw import split_adamw_update
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import ESTIMATORS
from entropy_core.gradients import dot, entropy_gradient
from rl_training.algs.entropy_probe import SimpleEntropyProbe, prediction_standard_error
from rl_training.models import load_model_and_tokenizer
from rl_training.sampling import draw, sampling_law

ROWS = [{"prompt": f"{i}+{i}=", "prompt_index": i} for i in range(12)]


@pytest.fixture
def setting(tiny_policy):
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    law = sampling_law(model, tokenizer, 1.0, 6)
    batch = draw(model, tokenizer, ROWS, 2, law, seed=0, status="evaluation").to_batch(law)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1, "lr": 1e-4},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-4},
        ]
    )
    return model, batch, optimizer


def backward(model: torch.nn.Module, batch: SequenceBatch, seed: int) -> None:
    weights = torch.randn(len(batch), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
    logprobs = logits.gather(2, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]
    (-(weights[:, None] * logprobs).sum() / len(batch)).backward()


def step(model, batch, optimizer, seed, probe=None):
    optimizer.zero_grad()
    backward(model, batch, seed)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if probe:
        probe.before_step(optimizer)
    optimizer.step()
    return probe.after_step() if probe else None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_total_is_the_gradient_along_the_step_and_parts_sum_to_it(setting, estimator):
    model, batch, optimizer = setting
    for seed in range(3):
        step(model, batch, optimizer, seed)
    gradient = entropy_gradient(model, batch, estimator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    probe = SimpleEntropyProbe(model, estimator)
    probe.observe(batch)
    change = step(model, batch, optimizer, 3, probe)
    taken = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert change is not None
    assert change.total == pytest.approx(dot(gradient, taken), rel=1e-4)
    assert change.batch + change.momentum + change.weight_decay == pytest.approx(change.total, rel=2e-3, abs=1e-7)
    assert change.momentum != 0 and change.weight_decay != 0 and change.sequences == 24
    assert change.measured.before == pytest.approx(change.entropy)


def test_plain_gradient_step_has_no_preconditioner_and_no_momentum(setting):
    model, batch, optimizer = setting
    step(model, batch, optimizer, 0)
    gradient = entropy_gradient(model, batch)
    probe = SimpleEntropyProbe(model, preconditioning="none")
    probe.observe(batch)
    optimizer.zero_grad()
    backward(model, batch, 1)
    expected = 0.0
    for name, p in model.named_parameters():
        rate = 1e-4 if p.dim() > 1 else 3e-4
        expected += -rate * float((gradient[name].double() * p.grad.double()).sum())
    probe.before_step(optimizer)
    optimizer.step()
    change = probe.after_step()
    assert change is not None and change.total == pytest.approx(expected, rel=1e-4)
    assert change.momentum == change.weight_decay == 0.0 and change.batch == change.total


def test_without_an_observation_nothing_is_predicted_and_nothing_kept(setting):
    model, batch, optimizer = setting
    probe = SimpleEntropyProbe(model)
    assert step(model, batch, optimizer, 0, probe) is None
    probe.observe(batch)
    assert step(model, batch, optimizer, 1, probe) is not None
    assert probe._observation is None and probe._inputs is None, "tensors of the last step are held on to"


def test_the_probe_changes_neither_weights_nor_gradients_nor_streams(setting):
    model, batch, optimizer = setting
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    torch.manual_seed(0)
    probe = SimpleEntropyProbe(model)
    model.train()
    for seed in range(3):
        probe.observe(batch)
        step(model, batch, optimizer, seed, probe)
        step(twin, batch, twin_optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state()), "the probe drew random numbers"
    assert model.training


def test_standard_error_is_of_the_mean_over_prompts(setting):
    """Against the spread over independent batches: within the factor that 24 sequences allow."""
    model, _, optimizer = setting
    from rl_training.models import load_model_and_tokenizer as load

    tokenizer = load(str(model.config._name_or_path), device="cpu")[1]
    law = sampling_law(model, tokenizer, 1.0, 6)
    rows = [{"prompt": f"{i}*{i}=", "prompt_index": i} for i in range(48)]
    batches = [draw(model, tokenizer, rows, 1, law, seed=s, status="evaluation").to_batch(law) for s in range(16)]
    from entropy_core.scores import token_statistics

    gradients = [entropy_gradient(model, b) for b in batches]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    earlier = [token_statistics(model, b) for b in batches]
    step(model, batches[0], optimizer, 0)
    taken = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    predictions = torch.tensor([dot(g, taken) for g in gradients])
    errors = torch.tensor(
        [
            prediction_standard_error(e, token_statistics(model, b), b, "rao_blackwell")
            for e, b in zip(earlier, batches, strict=True)
        ]
    )
    ratio = float(errors.mean() / predictions.std())
    assert 0.5 < ratio < 2.0, (
        f"ratio {ratio:.2f}: near {48**0.5:.1f} it is the spread of a summand, not the error of the mean"
    )


def test_split_of_the_real_step(setting):
    model, batch, optimizer = setting
    from entropy_core.adamw import read_adamw_state

    step(model, batch, optimizer, 0)
    optimizer.zero_grad()
    backward(model, batch, 1)
    named = dict(model.named_parameters())
    state = {
        n: s.__class__(s.exp_avg.clone(), s.exp_avg_sq.clone(), s.step, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay)
        for n, s in read_adamw_state(optimizer, named).items()
    }
    update = split_adamw_update(state, {n: p.grad.clone() for n, p in named.items()}, named).total()
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer.step()
    left = torch.cat([update[n].flatten() for n in named]).double()
    right = torch.cat([(p.detach() - before[n]).flatten() for n, p in named.items()]).double()
    assert torch.dot(left, right) / left.norm() / right.norm() > 0.99999
