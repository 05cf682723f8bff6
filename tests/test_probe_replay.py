"""The replay bench: its arithmetic against enumeration, loops and autograd, and its recorder on a run of three steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.probe_replay import rivals, score
from benchmarks.probe_replay.agreement import Pairs, agreement
from benchmarks.probe_replay.estimators import Estimator, momentum_scale, statistic
from benchmarks.probe_replay.page import rival_table
from benchmarks.probe_replay.recorder import Recorder, RecordSettings
from benchmarks.probe_replay.replay import RESULTS
from benchmarks.probe_replay.schedules import Filter, Gradient, LocalLevel, choose
from benchmarks.probe_replay.tape import Estimated, RecordedStep, Sequences, Tape, load_tape
from entropy_core.adamw import AdamWParameterState, split_adamw_update
from rl_training.train import build_trainer
from tests.oracle.enumeration import (
    detached_parameters,
    enumerate_completions,
    exact_entropies,
    solve,
    token_terms,
    unflatten,
)
from tests.oracle.policy import RecurrentPolicy, Task
from tests.tiny_policy import save_tiny_policy, tiny_train_config


@pytest.fixture(scope="module")
def world() -> tuple[Sequences, float, float]:
    """Every completion of one prompt, twice under two prompt numbers (so that "the other prompts" are the policy itself), before
    and after a small step; the exact slope along the step, and the exact change."""
    policy = RecurrentPolicy()
    space = enumerate_completions(Task(prompts=((1, 2),), vocabulary=4, max_completion_length=3))
    exact = solve(policy, space)
    named = detached_parameters(policy)
    flat = 1e-4 * torch.randn(
        len(exact.token_entropy_gradient), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    moved = {name: named[name] + step for name, step in unflatten(flat, named).items()}
    with torch.no_grad():
        after = token_terms(policy, space, parameters=moved)
        h_after = float(exact_entropies(policy, space, parameters=moved)[1])
    parts = torch.zeros((*exact.logprobs.shape, 3), dtype=torch.float64)
    along = [parts.clone(), parts.clone()]
    along[0][..., 0], along[1][..., 0] = exact.logprob_gradients @ flat, exact.entropy_gradients @ flat
    once = Sequences(
        space.mask.bool(),
        torch.zeros(len(space.tokens), dtype=torch.long),
        exact.probabilities,
        exact.logprobs,
        exact.entropies,
        *after,
        along[0],
        along[1],
    )
    twice = once.select(torch.arange(len(space.tokens)).repeat(2))
    number = torch.arange(len(twice.prompt)) // len(space.tokens)
    twice = replace(twice, prompt=number)
    return twice, float(exact.token_entropy_gradient @ flat), h_after - exact.token_entropy


def values_of_prefixes(s: Sequences) -> torch.Tensor:
    """Some V that depends on the prefix alone: on the position and on H_k."""
    position = torch.arange(s.mask.shape[1], dtype=torch.float64)
    value = 0.3 - 0.2 * position + 0.1 * s.entropy
    return torch.stack([value, 2.0 - 0.5 * position + 0 * value], -1) * s.mask[..., None]


@pytest.mark.parametrize("advantages", ["split", "rao_blackwell", "without_own", "td"])
def test_first_order_estimators_are_exact_on_the_whole_distribution(
    world: tuple[Sequences, float, float], advantages: str
) -> None:
    s, slope, _ = world
    found = statistic(Estimator("along", advantages), s, values_of_prefixes(s))[0]  # pyright: ignore[reportArgumentType]
    assert found.value == pytest.approx(slope, rel=1e-9), "a wrong centre, or A_k of another token"


def test_the_fixed_prefix_is_another_estimand(world: tuple[Sequences, float, float]) -> None:
    s, slope, _ = world
    assert abs(statistic(Estimator("along", "fixed_prefix"), s)[0].value - slope) > 0.05 * abs(slope)


@pytest.mark.parametrize("critic", [True, False])
def test_watching_finds_a_small_change(world: tuple[Sequences, float, float], critic: bool) -> None:
    s, _, change = world
    found = statistic(Estimator("moved", "td", 1.0, critic), s, values_of_prefixes(s))[0]
    assert found.value == pytest.approx(change, rel=2e-3)  # second order in a step of 1e-4


def test_reweighting_is_exact_on_the_whole_distribution(world: tuple[Sequences, float, float]) -> None:
    s, _, change = world
    found, effective = s.snis()
    assert found.value == pytest.approx(change, rel=1e-9)
    assert effective < 1


def test_no_sequence_meets_its_own_prompts_part_when_crossed(world: tuple[Sequences, float, float]) -> None:
    s, slope, _ = world
    assert s.logprob_along is not None and s.entropy_along is not None
    # The batch's part belongs to prompt 0 alone: prompt 1 sees all of it, twice over as one of two prompts; prompt 0 nothing.
    own = (s.prompt == 0).double()[:, None]
    widened = [torch.cat([x, (x[..., 0] * own)[..., None]], -1) for x in (s.logprob_along, s.entropy_along)]
    crossed = replace(s, logprob_along=widened[0], entropy_along=widened[1])
    found = statistic(Estimator("crossed", "without_own"), crossed)[0]
    assert found.value == pytest.approx(slope, rel=1e-9)


def test_the_momentums_part_stands_for_a_step_of_equal_gradients() -> None:
    gradient, moments = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    state = AdamWParameterState(moments, moments, 0, 1e-2, 0.9, 0.999, 1e-8, 0.0)
    for step in range(1, 6):
        parts = split_adamw_update({"w": state}, {"w": gradient}, {"w": moments})
        if step > 1:
            scaled = momentum_scale(step) * parts.momentum["w"]
            assert torch.allclose(scaled, parts.total()["w"], rtol=1e-12)
        m, v = 0.9 * state.exp_avg + 0.1 * gradient, 0.999 * state.exp_avg_sq + 0.001 * gradient**2
        state = replace(state, exp_avg=m, exp_avg_sq=v, step=step)


def test_a_level_that_stays_is_the_mean_of_what_was_seen() -> None:
    level = LocalLevel(Filter(keep=0.9, start=1, relative=False, least=0.0))
    seen = [1.0, 1.01, 0.99, 1.005]
    for n, value in enumerate(seen, 1):
        level.add(value, 1.0)
        now = level.now()
        assert now is not None
        assert now.value == pytest.approx(np.mean(seen[:n]))
        assert now.error == pytest.approx(n**-0.5)
    level.pass_by()
    later = level.now()
    assert later is not None and later.value == pytest.approx(np.mean(seen))


def random_steps() -> Tape:
    rng = np.random.default_rng(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    steps = []
    for _ in range(3):
        mask = torch.ones(4, 2, dtype=torch.bool)
        prompt = torch.tensor([0, 0, 1, 1])
        s = Sequences(
            mask, prompt, torch.ones(4).double(), *(some(4, 2) for _ in range(4)), some(4, 2, 3), some(4, 2, 3)
        )
        steps.append(RecordedStep(s, s, s, {}, some(6, 4, 2, 2), some(6, 4, 2, 2)))
    return Tape("random", steps, [Estimated(0.0, 1.0)] * 3, [False] * 3)


def test_a_running_average_of_gradients_is_what_loops_say() -> None:
    tape, estimator = random_steps(), Estimator("along", "rao_blackwell")
    found = Gradient(estimator, n=4, averaging=0.5, lagged_batch=False).series(tape)[2]

    def gradient(step: int, u: torch.Tensor, v: torch.Tensor) -> float:
        """<g of that step's sequences, a direction along which H moves by u and log pi by v>, token by token."""
        s, total = tape.steps[step].own, 0.0
        for i in range(4):
            others = [j for j in range(4) if s.prompt[j] != s.prompt[i]]
            h = float(s.entropy[others].sum()) / (2 * len(others))
            for k in range(2):
                to_go = sum(float(s.entropy[i, j]) - h for j in range(k, 2))
                total += float(u[i, k]) + float(v[i, k]) * to_go
        return total / 8

    last = tape.steps[2]
    own = last.own
    assert own.entropy_along is not None and own.logprob_along is not None
    assert last.lagged_entropy is not None and last.lagged_logprob is not None and found is not None
    by_age = [gradient(2, own.entropy_along.sum(-1), own.logprob_along.sum(-1))]
    by_age += [gradient(1 - k, last.lagged_entropy[k].sum(-1), last.lagged_logprob[k].sum(-1)) for k in (0, 1)]
    assert found.value == pytest.approx(0.5 * by_age[0] + 0.25 * by_age[1] + 0.25 * by_age[2])


def test_prompts_come_before_completions_of_one() -> None:
    s = random_steps().steps[0].own
    assert choose(s, 2).prompt.tolist() == [0, 1]
    assert choose(s, 2, per_prompt=2).prompt.tolist() == [0, 0]


def test_the_discriminator_is_the_derivative_of_a_contexts_entropy() -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    drawn, advantage = 2, -1.7
    sampling_config = torch.log_softmax(logits, 0)
    entropy = -(sampling_config.exp() * sampling_config).sum()
    (gradient,) = torch.autograd.grad(entropy, logits)
    step = advantage * (torch.eye(5, dtype=torch.float64)[drawn] - sampling_config.exp())
    p, h = sampling_config.exp().detach(), entropy.detach()
    s = random_steps().steps[0].own.select(torch.tensor([0]))
    extra = {
        "advantage": torch.tensor([advantage], dtype=torch.float64),
        "sharpness": (p**2 * (sampling_config.detach() + h)).sum().expand(1, 2),
    }
    s = replace(s, logprob=sampling_config.detach()[drawn].expand(1, 2), entropy=h.expand(1, 2), extra=extra)
    assert float(rivals.discriminator_tokens(s)[0, 0]) == pytest.approx(float((gradient @ step).detach()))


def test_agreement_is_what_plain_regressions_say() -> None:
    rng = np.random.default_rng(5)
    last = rng.normal(size=60)
    truth = 0.8 * last + rng.normal(size=60)
    predicted = truth + 0.5 * rng.normal(size=60)
    ones, run = np.ones(60), np.repeat([0, 1, 2], 20)
    found = agreement(Pairs(predicted, 0.5 * ones, 1.96 * ones, truth, 0 * ones, last, run), draws=20)
    left = [x - np.polyval(np.polyfit(last, x, 1), last) for x in (predicted, truth)]
    assert found["partial"] == pytest.approx(np.corrcoef(left[0], left[1])[0, 1])
    assert found["slope"] == pytest.approx(np.polyfit(predicted, truth, 1)[0])
    assert found["sum"] == pytest.approx(predicted.sum() / truth.sum())
    assert 0.85 <= float(found["coverage"]) <= 1.0
    low, high = found["r_interval"]
    assert low < found["r"] < high


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Tape:
    """Three recorded steps of the tiny policy."""
    folder = tmp_path_factory.mktemp("replay")
    config = tiny_train_config(
        save_tiny_policy(folder / "policy"),
        folder / "run",
        training={"steps": 3, "save_every": 100},
        training_buffer={"max_refill_rounds": 0},
        optimizer={"weight_decay": 0.01, "max_grad_norm": 0.1},
        entropy_probe={"enabled": False},
    )
    trainer, task = build_trainer(config)
    settings = RecordSettings(held_out=12, lags=1, pool=8, shares=True)
    trainer.add_callback(Recorder(trainer, task.heldout, settings, folder))
    trainer.train()
    return load_tape("tiny", folder)


@pytest.mark.long
def test_recorded_derivatives_are_those_of_the_step(recorded: Tape) -> None:
    assert len(recorded) == 3
    for step in recorded.steps:
        assert step.numbers["step_residual"] < 1e-3, "the recorded direction is not the step that was taken"
        assert step.numbers["fold_residual"] < 1e-3, "the prompts' parts do not add up to the loss gradient"
        s = step.own
        assert s.logprob_along is not None
        taken = (s.logprob_after - s.logprob)[s.mask]
        linear = s.logprob_along[..., :3].sum(-1)[s.mask]
        assert float((taken - linear).norm() / taken.norm()) < 0.1  # what is left is of second order
        batch = (s.extra["logprob_batch"] - s.logprob)[s.mask]
        assert float((batch - s.logprob_along[..., 0][s.mask]).norm() / batch.norm().clamp(min=1e-9)) < 0.1


def test_shares_of_tokens_add_up_to_the_batchs_part(recorded: Tape) -> None:
    """Along P dh on trained tokens, against dh (Rao-Blackwell on the held-out tokens) along the batch's part: one number."""
    step = recorded.steps[2]
    held = step.held
    assert held.logprob_along is not None and held.entropy_along is not None
    h = held.h
    to_go = ((held.entropy - h) * held.mask).flip(1).cumsum(1).flip(1)
    along = (held.entropy_along[..., 0] + to_go * held.logprob_along[..., 0]).sum() / held.mask.sum()
    assert float(step.own.extra["share"].sum()) == pytest.approx(float(along), rel=1e-3)


def test_lagged_derivatives_are_of_the_step_before(recorded: Tape) -> None:
    step, earlier = recorded.steps[2], recorded.steps[1].own
    assert step.lagged_logprob is not None and earlier.logprob_along is not None
    # Momentum carries most of a step on: the sequences of the step before move along it much as along their own step.
    now = step.lagged_logprob[0, :, :, 1].double()[earlier.mask]
    then = earlier.logprob_along[..., :3].sum(-1)[earlier.mask]
    assert float(torch.corrcoef(torch.stack([now, then]))[0, 1]) > 0.9
    assert (
        bool(torch.isnan(recorded.steps[0].lagged_logprob).all())
        if recorded.steps[0].lagged_logprob is not None
        else False
    )


def test_the_pool_is_never_older_than_its_age(recorded: Tape) -> None:
    keys = [step.pool.extra["prompt_key"].long().tolist() for step in recorded.steps]
    changed = [[j for j in range(8) if keys[t][j] != keys[t - 1][j]] for t in (1, 2)]
    assert changed == [[1], [2]]
    assert np.allclose(recorded.steps[0].pool.omega, 1.0)


def by_level(step: score.BeforeStep) -> float:
    return -step.own.h


def test_a_record_holds_what_is_known_before_a_step_and_scores_a_function(recorded: Tape, tmp_path: Path) -> None:
    score.pack(recorded, tmp_path / "tiny-0.npz")
    record = score.load(tmp_path / "tiny-0.npz")
    assert [t.value for t in record.truth] == pytest.approx([t.value for t in recorded.truth], rel=1e-6)
    for step, of_tape in zip(record.steps, recorded.steps, strict=True):
        assert step.own.logprob_after.isnan().all() and step.own.logprob_along is None, (
            "a predictor sees the step's outcome"
        )
        expected = rivals.token_rivals(of_tape.own, of_tape.numbers["learning_rate"])
        found = rivals.token_rivals(step.own, step.learning_rate)
        scale = max(map(abs, expected.values()))
        assert found == {name: pytest.approx(value, rel=0.02, abs=1e-3 * scale) for name, value in expected.items()}
    assert [len(step.earlier) for step in record.steps] == [0, 1, 2]
    by_truth = dict(zip(map(id, record.steps), record.truth, strict=True))
    perfect = score.score(lambda step: by_truth[id(step)].value, [record])
    assert perfect["r"] == pytest.approx(1.0) and perfect["slope"] == pytest.approx(1.0)
    rows = score.table(
        {**score.rivals(), "mine": score.find("tests.test_probe_replay:by_level")}, [record]
    ).splitlines()
    assert len(rows) == 2 + 7 and sum(row.startswith("| mine |") for row in rows) == 1


def test_a_predictor_that_is_missing_or_says_no_number_is_told_in_a_line(recorded: Tape, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="module:function"):
        score.find("tests.test_probe_replay:nobody")
    score.pack(recorded, tmp_path / "tiny-0.npz")
    with pytest.raises(SystemExit, match="step 0 is predicted as no finite number"):
        score.score(lambda step: float("nan"), [score.load(tmp_path / "tiny-0.npz")])


def test_the_documented_table_of_rivals_is_of_the_stored_replay() -> None:
    shown = Path("docs/study/predictors.md").read_text()
    assert rival_table(json.loads((RESULTS / "replay.json").read_text())) in shown


def test_the_shipped_records_are_whole() -> None:
    found = {path.stem: score.load(path) for path in sorted(score.RECORDS.glob("*.npz"))}
    assert {name: len(record) for name, record in found.items()} == {
        **dict.fromkeys(("small-0", "small-1", "small-2"), 100),
        "turning-0": 110,
    }
    first = found["small-0"]
    assert all(np.isfinite(rival(first.steps[20])) for rival in score.rivals().values())
    assert all(truth.error > 0 for truth in first.truth)
