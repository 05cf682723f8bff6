"""The split of an AdamW step against torch.optim.AdamW itself, in float64.

Training here is rough on purpose: two groups that differ in every hyper-parameter, a learning rate that
moves, clipping that bites at every step, gradient accumulation. A measured δθ = θ_after − θ_before is the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from entropy_core.adamw import (
    AdamWParameterState,
    AdamWUpdate,
    adam_preconditioner,
    after_gradient,
    batch_step_factor,
    read_adamw_state,
    split_adamw_update,
)
from tests.oracle.comparison import assert_close, cosine
from tests.oracle.enumeration import flatten as flatten_in_order
from tests.oracle.policy import RecurrentPolicy

Gradients = dict[str, Tensor]
CLIP = 0.05


def flatten(named: dict[str, Tensor]) -> Tensor:
    """One vector, by name: optimizer groups list parameters in another order than the model does."""
    return flatten_in_order(dict(sorted(named.items())))


def two_groups(model: torch.nn.Module) -> torch.optim.AdamW:
    """Matrices decay, vectors do not: another learning rate, betas and ε each. Nothing equals the
    defaults."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "lr": 3e-3, "betas": (0.9, 0.97), "eps": 1e-4, "weight_decay": 0.3},
            {"params": vectors, "lr": 7e-3, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.0},
        ]
    )


@dataclass(frozen=True)
class Step:
    """One optimizer step: what was known before it, and what it did."""

    before: dict[str, AdamWParameterState]
    raw: Gradients
    clipped: Gradients
    theta: dict[str, Tensor]
    moved: dict[str, Tensor]
    split: AdamWUpdate


def copied(states: dict[str, AdamWParameterState]) -> dict[str, AdamWParameterState]:
    return {
        name: replace(state, exp_avg=state.exp_avg.clone(), exp_avg_sq=state.exp_avg_sq.clone())
        for name, state in states.items()
    }


def train(
    steps: int, accumulation: int = 1, make_optimizer: Callable[..., torch.optim.Optimizer] = two_groups
) -> tuple[RecurrentPolicy, torch.optim.Optimizer, Step]:
    """Train a small policy on random tokens and take the last step apart."""
    model = RecurrentPolicy()
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(4)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (done + 1) / 5 if done < 4 else 0.98**done)
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        for _ in range(accumulation):
            ids = torch.randint(0, 4, (6, 5), generator=generator)
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (loss / accumulation).backward()
        raw = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > 2 * CLIP, "clipping does not bite, so the test would not see it"
        if number == steps:
            break
        optimizer.step()
        warmup.step()
    named = dict(model.named_parameters())
    before = copied(read_adamw_state(optimizer, named))
    clipped = {name: p.grad.clone() for name, p in named.items()}
    theta = {name: p.detach().clone() for name, p in named.items()}
    split = split_adamw_update(before, clipped, theta)
    optimizer.step()
    moved = {name: p.detach() - theta[name] for name, p in named.items()}
    return model, optimizer, Step(before, raw, clipped, theta, moved, split)


def naive_update(taken: Step, **changes: object) -> Tensor:
    """The whole step with hyper-parameters replaced: what reading them in the wrong place would give."""
    states = {name: replace(state, **changes) for name, state in taken.before.items()}
    return flatten(split_adamw_update(states, taken.clipped, taken.theta).total())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_split_is_the_step(steps: int, accumulation: int) -> None:
    _, _, step = train(steps, accumulation)
    assert all(state.step == steps - 1 for state in step.before.values())
    total, moved = flatten(step.split.total()), flatten(step.moved)
    parts = flatten(step.split.batch) + flatten(step.split.momentum) + flatten(step.split.weight_decay)
    assert_close(total, parts, 1e-14, "total() is not the sum of its parts")
    mistakes = {
        "no weight decay": flatten(step.split.batch) + flatten(step.split.momentum),
        "the gradient before clipping": flatten(split_adamw_update(step.before, step.raw, step.theta).total()),
        "ε of the optimizer's defaults": naive_update(step, eps=1e-8),
        "the learning rate of another group": naive_update(step, lr=1e-3),
        "P applied twice": total
        * flatten({n: 1.0 / s.exp_avg_sq.clamp(min=1e-12).sqrt() for n, s in step.before.items()}),
    }
    if steps > 1:
        mistakes |= {
            "β1 of the optimizer's defaults or of another group": naive_update(step, beta1=0.85),
            "momentum left out": flatten(step.split.batch) + flatten(step.split.weight_decay),
            "no bias correction": naive_update(step, step=10**6),
            "β2 of the optimizer's defaults or of another group": naive_update(step, beta2=0.95),
        }
    assert_close(total, moved, 1e-9, "the split does not add up to θ_after − θ_before", mistakes)
    assert cosine(total, moved) >= 0.9999999


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_each_part_follows_its_formula(steps: int) -> None:
    """Written out once more, element by element, with the moments that the optimizer holds *after* the
    step."""
    model, optimizer, step = train(steps)
    for name, parameter in model.named_parameters():
        state, before = optimizer.state[parameter], step.before[name]
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        (beta1, beta2), lr, t = group["betas"], group["lr"], steps
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
        scale = -lr / (1 - beta1**t) / denominator
        batch = scale * (1 - beta1) * step.clipped[name]
        momentum = scale * beta1 * before.exp_avg
        assert_close(step.split.batch[name], batch, 1e-10, f"{name}: −η(1−β1)/(1−β1^t) P ĝ")
        if steps > 1:
            assert_close(step.split.momentum[name], momentum, 1e-10, f"{name}: −η β1/(1−β1^t) P m_(t−1)")
        else:
            assert not step.split.momentum[name].any(), "the first step has no momentum"
        decay = -lr * group["weight_decay"] * step.theta[name]
        assert_close(step.split.weight_decay[name], decay, 1e-12, f"{name}: −η λ θ of its own group, θ before the step")


@pytest.mark.parametrize("steps", [1, 50])
def test_the_preconditioner_is_that_of_the_step(steps: int) -> None:
    """δθ = −η P m̂ − ηλθ with P read after the step: one home, one convention."""
    model, optimizer, step = train(steps)
    preconditioner = adam_preconditioner(optimizer, model.named_parameters())
    for name, state in read_adamw_state(optimizer, model.named_parameters()).items():
        first_moment = state.exp_avg / (1 - state.beta1**state.step)
        rest = step.moved[name] + state.lr * state.weight_decay * step.theta[name]
        second = (state.exp_avg_sq / (1 - state.beta2**state.step)).sqrt()
        assert_close(
            preconditioner[name] * first_moment * -state.lr,
            rest,
            1e-9,
            f"{name}: P is 1/(sqrt(v̂) + ε)",
            {
                "ε inside the root": -state.lr * first_moment / (second.square() + state.eps).sqrt(),
                "v without its bias correction": -state.lr * first_moment / (state.exp_avg_sq.sqrt() + state.eps),
                "1/v̂, without the root": -state.lr * first_moment / (second.square() + state.eps),
            },
        )


def constant_gradient_step(steps: int) -> AdamWUpdate:
    """The split of step `steps` of a parameter that has received the same gradient every time, at torch's
    defaults."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([("w", parameter)], lr=1e-2)
    for _ in range(steps - 1):
        parameter.grad = torch.tensor([0.3, -0.1], dtype=torch.float64)
        optimizer.step()
    named = {"w": parameter}
    gradient = {"w": torch.tensor([0.3, -0.1], dtype=torch.float64)}
    return split_adamw_update(read_adamw_state(optimizer, named), gradient, named)


@pytest.mark.parametrize(("steps", "share"), [(1, 1.0), (2, 0.1 / 0.19), (50, 0.1 / (1 - 0.9**50))])
def test_the_current_batch_is_a_tenth_of_a_late_step(steps: int, share: float) -> None:
    """Under a constant gradient the batch's share is (1 − β1)/(1 − β1^t): all of the first step, a tenth of a
    late one."""
    split = constant_gradient_step(steps)
    ratio = split.batch["w"] / (split.batch["w"] + split.momentum["w"])
    wanted = torch.full((2,), share, dtype=torch.float64)
    assert_close(ratio, wanted, 1e-9, "momentum is counted in the batch's share, or the batch's in momentum's")


def test_a_parameter_without_gradient_stands_still() -> None:
    """torch skips it altogether: no momentum, no decay. A gradient of zeros is another matter."""
    model, optimizer, _ = train(5)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.grad = None if name == "mix.weight" else torch.zeros_like(parameter)
    theta = {name: p.detach().clone() for name, p in named.items()}
    split = split_adamw_update(copied(read_adamw_state(optimizer, named)), {n: p.grad for n, p in named.items()}, theta)
    optimizer.step()
    assert not split.total()["mix.weight"].any(), "a skipped parameter is predicted to move"
    assert not any(part.any() for part in split.batch.values()), "a gradient of zeros has no share"
    moved = {name: p.detach() - theta[name] for name, p in named.items()}
    assert_close(flatten(split.total()), flatten(moved), 1e-9, "momentum and decay go on under a gradient of zeros")


def test_states_are_mapped_by_identity_not_by_order_or_shape() -> None:
    """Names in another order than the optimizer's groups; `mix` and `hidden` have one shape, so shapes cannot
    tell."""
    model, optimizer, step = train(7)
    shuffled = list(model.named_parameters())[::-1]
    states = read_adamw_state(optimizer, shuffled)
    for name, parameter in model.named_parameters():
        assert states[name].exp_avg is optimizer.state[parameter]["exp_avg"], (
            f"{name} got the state of another parameter"
        )
    assert states["hidden.bias"].eps == 1e-6 and states["mix.weight"].eps == 1e-4, "hyper-parameters of the wrong group"
    assert states["hidden.bias"].lr == optimizer.param_groups[1]["lr"], "the scheduled learning rate is not read"
    assert states["mix.weight"].step == 7
    wrapped = read_adamw_state(SimpleNamespace(optimizer=optimizer), model.named_parameters())
    assert wrapped.keys() == states.keys(), "an accelerate wrapper is not opened"


def test_named_optimizers_need_no_names() -> None:
    model, optimizer, _ = train(3, make_optimizer=lambda m: torch.optim.AdamW(m.named_parameters(), lr=1e-3))
    without, given = adam_preconditioner(optimizer), adam_preconditioner(optimizer, model.named_parameters())
    assert without.keys() == given.keys() and all(torch.equal(without[name], given[name]) for name in given)
    nameless = two_groups(model)
    with pytest.raises(ValueError, match="named_parameters"):
        adam_preconditioner(nameless)


def test_state_after_a_gradient_is_the_optimizers() -> None:
    model, optimizer, step = train(6)
    for name, parameter in model.named_parameters():
        predicted = after_gradient(step.before[name], step.clipped[name])
        assert predicted.step == 6
        assert_close(predicted.exp_avg, optimizer.state[parameter]["exp_avg"], 1e-12, "m_t = β1 m + (1 − β1) ĝ")
        assert_close(predicted.exp_avg_sq, optimizer.state[parameter]["exp_avg_sq"], 1e-12, "v_t = β2 v + (1 − β2) ĝ²")


def test_the_factor_of_the_batch() -> None:
    state = AdamWParameterState(torch.zeros(1), torch.zeros(1), 49, 1e-3, 0.9, 0.999, 1e-8, 0.0)
    assert_close(batch_step_factor(state), 1e-3 * 0.1 / (1 - 0.9**50), 1e-12, "η (1−β1)/(1−β1^t), t after the step")


def test_before_any_step_there_is_no_preconditioner() -> None:
    model = RecurrentPolicy()
    optimizer = two_groups(model)
    states = read_adamw_state(optimizer, model.named_parameters())
    assert all(s.step == 0 and not s.exp_avg.any() for s in states.values())
    with pytest.raises(ValueError, match="step"):
        adam_preconditioner(optimizer, model.named_parameters())


def test_names_must_cover_each_other() -> None:
    model, optimizer, step = train(2)
    with pytest.raises(ValueError):
        read_adamw_state(optimizer, list(model.named_parameters())[1:])
    extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="'extra'"):
        read_adamw_state(optimizer, [*model.named_parameters(), ("extra", extra)])
    with pytest.raises(ValueError, match="mix.weight"):
        split_adamw_update(step.before, {n: g for n, g in step.clipped.items() if n != "mix.weight"}, step.theta)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("SGD", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("RMSprop", lambda p: torch.optim.RMSprop(p)),
        ("Adagrad", lambda p: torch.optim.Adagrad(p)),
        ("maximize", lambda p: torch.optim.AdamW(p, maximize=True)),
        ("coupled decay", lambda p: torch.optim.Adam(p, weight_decay=0.1)),
        ("NAdam", lambda p: torch.optim.NAdam(p)),
        ("RAdam", lambda p: torch.optim.RAdam(p)),
        ("Adamax", lambda p: torch.optim.Adamax(p)),
    ],
)
def test_other_optimizers_are_refused(name: str, make: Callable) -> None:
    """Cousins of Adam carry the same hyper-parameters and take other steps: to split them as AdamW's would be
    silent."""
    model = RecurrentPolicy()
    optimizer = make(model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    optimizer.step()
    with pytest.raises((ValueError, TypeError)):
        read_adamw_state(optimizer, model.named_parameters())


def test_amsgrad_divides_by_the_largest_second_moment_so_far() -> None:
    """Gradients that shrink make the largest v differ from the last one: P of the last one would be too large."""

    def amsgrad(model: torch.nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.5), weight_decay=0.1, amsgrad=True)

    _, _, step = train(9, make_optimizer=amsgrad)
    assert_close(flatten(step.split.total()), flatten(step.moved), 1e-9, "the step of amsgrad is split exactly")
    plain = {name: replace(state, max_exp_avg_sq=None) for name, state in step.before.items()}
    other = split_adamw_update(plain, step.clipped, step.theta).total()
    assert float((flatten(other) - flatten(step.moved)).norm() / flatten(step.moved).norm()) > 1e-3


def test_plain_adam_without_decay_is_adamw() -> None:
    _, _, step = train(9, make_optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=2e-3))
    assert_close(flatten(step.split.total()), flatten(step.moved), 1e-9, "Adam without decay takes AdamW's step")
