"""The watch by forward passes alone, on a policy whose completions are enumerated; and weights that are moved and put back."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Iterator

import pytest
import torch

from entropy_core.gradients import trainable_parameters
from rl_training.config import EntropyProbeConfig
from rl_training.probe.trial_moves import TrialMoves
from rl_training.probe.watch import EntropyWatch
from rl_training.probe.watch_state import STATE_KEY, WatchHistory
from tests.rl_training.probe_setting import Setting


@pytest.fixture(scope="module")
def trained() -> Setting:
    setting = Setting.fresh()
    for seed in range(3):
        setting.step(seed)
    return setting


def make_watch(setting: Setting, **config: object) -> EntropyWatch:
    return EntropyWatch(EntropyProbeConfig(**{"rollouts": "current", "bias_keep": 0.95, **config}), setting.model)


def watched_step(setting: Setting, watch: EntropyWatch, seed: int, parts: bool = False):
    """A step of AdamW with the policy's exact distribution before it."""
    log_weights = watch.look(setting.batch).statistics.scores()
    watch.before_step(setting.batch, log_weights)
    setting.backward(seed)
    if parts:
        watch.try_parts(setting.optimizer)
    setting.optimizer.step()
    return watch.after_step()


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_watched_change_is_the_exact_one_to_first_order(trained: Setting, decay: float) -> None:
    """The correction of the first watched step is its own: with lambda below one as exact as with lambda one."""
    off = []
    for shorter in (1.0, 0.25):
        setting = trained.twin()
        for group in setting.optimizer.param_groups:
            group["lr"] *= shorter
        before = setting.entropy()
        seen = watched_step(setting, make_watch(setting, advantage_decay=decay), 7)
        truth = setting.entropy() - before
        off.append(abs(seen.change.value - truth) / abs(truth))
        assert (seen.bias == 0.0) == (decay == 1.0)
    assert off[0] < 0.1 and off[1] < 0.5 * off[0], "what is left over is not of second order"


def test_the_uncorrected_change_is_biased_and_says_by_how_much(trained: Setting) -> None:
    setting = trained.twin()
    before = setting.entropy()
    seen = watched_step(setting, make_watch(setting, advantage_decay=0.0), 7)
    truth = setting.entropy() - before
    assert abs(seen.quiet.change - truth) > 3 * abs(seen.change.value - truth)
    assert seen.bias == pytest.approx(truth - seen.quiet.change, rel=0.3)


def test_parts_add_up_and_are_those_of_the_step(trained: Setting) -> None:
    setting = trained.twin()
    for group in setting.optimizer.param_groups:
        group["lr"] *= 0.1
    exact, start = setting.gradients()[0], setting.entropy()
    setting.backward(7)
    by_hand = setting.parts_by_hand()
    watch = make_watch(setting, advantage_decay=1.0)
    seen = watched_step(setting, watch, 7, parts=True)
    assert sum(part.value for part in seen.parts.values()) == pytest.approx(seen.quiet.change, rel=1e-9)
    for name, part in seen.parts.items():
        along = 0.1 * float(exact @ torch.cat([d.flatten() for d in by_hand[name].values()]))
        assert part.value == pytest.approx(along, rel=0.05, abs=2e-6), name
        assert math.isfinite(part.standard_error)
    assert seen.change.value == pytest.approx(setting.entropy() - start, rel=0.05)


@pytest.mark.parametrize("factor", [-1.0, 3.0, 1.0])
def test_parts_of_another_step_than_was_foretold_are_dropped_and_that_is_said_once(
    trained: Setting, factor: float
) -> None:
    setting = trained.twin()
    watch = make_watch(setting, advantage_decay=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (7, 8):
            watch.before_step(setting.batch, watch.look(setting.batch).statistics.scores())
            setting.backward(seed)
            watch.try_parts(setting.optimizer)
            for p in setting.model.parameters():
                p.grad.mul_(factor)
            setting.optimizer.step()
            seen = watch.after_step()
            assert bool(seen.parts) == (factor == 1.0)
    said = [w for w in caught if "another step than its state and gradients foretold" in str(w.message)]
    assert len(said) == (factor != 1.0)


def test_watching_and_trying_leave_training_bit_by_bit_as_it_was(trained: Setting) -> None:
    watched, alone = trained.twin(), trained.twin()
    watch = make_watch(watched)
    for seed in (7, 8):
        watched_step(watched, watch, seed, parts=True)
        alone.step(seed)
    for name, value in watched.values().items():
        assert torch.equal(value, alone.values()[name]), name


def test_other_optimizers_are_watched_without_parts(trained: Setting) -> None:
    setting = trained.twin()
    setting.optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.05)
    before, watch = setting.entropy(), make_watch(setting, advantage_decay=1.0)
    assert watch.why_no_parts(setting.optimizer) is not None and "SGD" in watch.why_no_parts(setting.optimizer)
    seen = watched_step(setting, watch, 7)
    assert seen.change.value == pytest.approx(setting.entropy() - before, rel=0.1) and not seen.parts


def test_a_step_that_nothing_was_seen_before_is_not_watched(trained: Setting) -> None:
    setting = trained.twin()
    watch = make_watch(setting)
    assert watch.after_step() is None
    watch.before_step(setting.batch)
    watch.forget_step()
    assert watch.after_step() is None


# --- trial moves ---------------------------------------------------------------------------------------------


def moved(setting: Setting) -> dict[str, torch.Tensor]:
    # Not a power of two: adding and taking off again would not give the same bits.
    return {name: torch.full_like(p, 0.1234567) for name, p in setting.model.named_parameters()}


@pytest.mark.parametrize("ending", ["quiet", "exception", "exception after two moves"])
def test_weights_come_back_bit_by_bit(trained: Setting, ending: str) -> None:
    setting = trained.twin()
    before, trial = setting.values(), TrialMoves(trainable_parameters(setting.model))
    try:
        with trial.begin() as move:
            move.move(moved(setting))
            assert not torch.equal(setting.values()["head.bias"], before["head.bias"]), "the test moves nothing"
            if ending.endswith("two moves"):
                move.move(moved(setting))
            if ending != "quiet":
                raise RuntimeError("a forward pass that fails")
    except RuntimeError:
        assert ending != "quiet"
    assert all(torch.equal(value, before[name]) for name, value in setting.values().items())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C: a shell starts background jobs, and so some test runs, without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ignored_interrupts_stay_ignored(trained: Setting, interruptible: None) -> None:
    setting = trained.twin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with TrialMoves(trainable_parameters(setting.model)).begin() as trial:
        trial.move(moved(setting))
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_until_the_weights_are_back(trained: Setting) -> None:
    setting, reached = trained.twin(), []
    before, handler = setting.values(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with TrialMoves(trainable_parameters(setting.model)).begin() as trial:
            trial.move(moved(setting))
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the first")
    assert reached == ["after the first"]
    assert all(torch.equal(value, before[name]) for name, value in setting.values().items())
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_goes_through_at_once(trained: Setting) -> None:
    setting, reached = trained.twin(), []
    before = setting.values()
    with pytest.raises(KeyboardInterrupt):
        with TrialMoves(trainable_parameters(setting.model)).begin() as trial:
            trial.move(moved(setting))
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second")
    assert reached == []
    assert all(torch.equal(value, before[name]) for name, value in setting.values().items())


# --- the record in a trainer's state -------------------------------------------------------------------------


def after_steps(trained: Setting, count: int) -> tuple[Setting, EntropyWatch, WatchHistory, dict]:
    setting, state = trained.twin(), {}
    watch, history = make_watch(setting), WatchHistory()
    assert history.begin(state, 0, watch) is None
    for step in range(count):
        seen = watched_step(setting, watch, step)
        history.add(step + 1, seen, watch, {"length": 4})
    return setting, watch, history, state


def test_a_resumed_watch_goes_on_as_if_nothing_had_happened(trained: Setting) -> None:
    setting, watch, _, state = after_steps(trained, 3)
    resumed_setting, resumed = setting.twin(), None
    resumed = make_watch(resumed_setting)
    history = WatchHistory()
    assert history.begin(dict(state), 3, resumed) is None and history.source == {"length": 4}
    for seed in (5, 6):
        went_on, again = watched_step(setting, watch, seed), watched_step(resumed_setting, resumed, seed)
        assert again.change.value == went_on.change.value and again.explained == went_on.explained
        assert again.filtered.value == pytest.approx(went_on.filtered.value, rel=1e-9)
        assert again.cumulative.standard_error == pytest.approx(went_on.cumulative.standard_error, rel=1e-9)
        assert again.cumulative.value == pytest.approx(went_on.cumulative.value, rel=1e-12)


def test_a_checkpoint_of_before_anything_was_watched_is_no_damage(trained: Setting) -> None:
    state: dict = {}
    WatchHistory().begin(state, 0, make_watch(trained))
    assert WatchHistory().begin(dict(state), 3, make_watch(trained)) is None


DAMAGE = {
    "no record": lambda r: "x",
    "cut short": lambda r: {**r, "critic": {**r["critic"], "upper": r["critic"]["upper"][:-8]}},
    "not base64": lambda r: {**r, "critic": {**r["critic"], "upper": "§" * 12}},
    "another shape": lambda r: {**r, "critic": {**r["critic"], "shape": [2, 3, 3]}},
    "no critic": lambda r: {**r, "critic": None},
    "a hole": lambda r: {**r, "quiet": [None, *r["quiet"][1:]]},
    "words": lambda r: {**r, "difference": ["a", *r["difference"][1:]]},
    "negative": lambda r: {**r, "quiet_variance": [-1.0, *r["quiet_variance"][1:]]},
    "unequal": lambda r: {**r, "covariance": r["covariance"][1:]},
    "no order": lambda r: {**r, "step": r["step"][::-1]},
    "the future": lambda r: {**r, "step": [1, 2, 99]},
    "a sum without units": lambda r: {**r, "critic": {**r["critic"], "sum": {"value": 1.0}}},
    "a sum that is none": lambda r: {**r, "critic": {**r["critic"], "sum": {**r["critic"]["sum"], "value": "x"}}},
    "no steps": lambda r: {**r, "steps": [0.0, *r["steps"][1:]]},
    "steps since": lambda r: {**r, "critic": {**r["critic"], "steps_since": -1}},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_is_said_and_begun_anew(trained: Setting, kind: str) -> None:
    setting, _, _, state = after_steps(trained, 3)
    fresh, damaged = make_watch(setting), {STATE_KEY: DAMAGE[kind](state[STATE_KEY])}
    trouble = WatchHistory().begin(damaged, 3, fresh)
    assert trouble is not None and "damaged" in trouble
    assert damaged[STATE_KEY]["step"] == [] and fresh._critic.tokens == 0.0
