"""The learning rate that a checkpoint's last step was taken with, per parameter group, where no sidecar says it.

With base rates b_g and the schedule's factor f, step n is taken with b_g f(n - 1). After it the Trainer

    logs       step n, rate b_0 f(n - 1)     in `trainer_state.json`, at every logging step only
    saves      b_g f(n)                      in `scheduler.pt` and in the groups of `optimizer.pt`: the *next* step's

so a log row of that very step settles it. Otherwise the schedules of transformers are tried with every warm-up: those that
agree with all that is recorded must agree on f(n - 1) as well, or nothing is said. Groups with schedules of their own are seen
by what is saved, which is not b_g f(n) with one f for all; their saved rates, of the next step, are all that is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rl_training.errors import UserError
from rl_training.run.record_ranges import LARGEST_LEARNING_RATE

_SAME = 1e-9
_MOST_WARMUP = 20_000
_REMEDY = "give checkpoint.learning_rate=..., the rate of that step"


def rates_of_last_step(
    step: int,
    log_history: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    scheduler: Mapping[str, Any] | None,
    most_steps: int | None,
) -> list[float]:
    """One rate per group. groups: of the saved optimizer; scheduler: its saved state; most_steps: the run's planned length.

    Raises UserError where the rate is not recorded and cannot be computed from the schedule with certainty.
    """
    after = [float(group["lr"]) for group in groups]
    base = _base_rates(groups, scheduler)
    logged = _logged(log_history, step)
    if _own_schedules(after, base):
        raise UserError(_groups_differ(f"the rate of step {step}", after))
    if step in logged and not _perhaps_of_the_next_step(step, logged, after[0]):
        return _scaled_to(logged[step], after, base)
    if base is None or scheduler is None or scheduler.get("last_epoch") != step or not base[0]:
        raise UserError(f"{_unlogged(step, logged)}, and its saved schedule does not give it: {_REMEDY}")
    factor = after[0] / base[0]
    lambdas = scheduler.get("lr_lambdas")
    if lambdas and all(x is None for x in lambdas) and factor == 1.0 and set(logged.values()) == {base[0]}:
        return after  # transformers' constant schedule is the one that is a plain function
    if lambdas and all(x is None for x in lambdas) and factor == 1.0:
        raise UserError(
            f"{_unlogged(step, logged)}, and its saved schedule is a plain function, as constant ones of transformers and verl "
            f"are, and perhaps one of your own: give checkpoint.learning_rate={after[0]!r}, the rate at the end of that step, if "
            "it was constant"
        )
    if not isinstance(lambdas, list) or any(x is None for x in lambdas):
        raise UserError(f"{_unlogged(step, logged)}, and its saved schedule is none of transformers: {_REMEDY}")
    # Releases of transformers before 4.48 logged the next step's rate.
    offset = 0 if step in logged else 1
    known = {s - offset: rate / base[0] for s, rate in logged.items()} | {step: factor}
    fitting = {
        round(f(step - 1), 12)
        for f in _schedules(most_steps, base[0])
        if all(_equal(f(k), v) for k, v in known.items())
    }
    if len(fitting) != 1:
        raise UserError(
            f"{_unlogged(step, logged)}, and {'no schedule' if not fitting else 'more than one schedule'} of transformers agrees "
            f"with the saved one: {_REMEDY}"
        )
    before = fitting.pop()
    return [b * before for b in base]


def logged_rate(step: int, log_history: Sequence[Mapping[str, Any]]) -> float | None:
    """The rate in the log row of that very step, of the first group; None without one."""
    return _logged(log_history, step).get(step)


def rates_after(groups: Sequence[Mapping[str, Any]], first: float, scheduler: Mapping[str, Any] | None) -> list[float]:
    """`first` for the first group, others in their ratio to it; [] of no groups. Raises UserError where it is not known."""
    if not groups:
        return []
    after, base = [float(group["lr"]) for group in groups], _base_rates(groups, scheduler)
    if not _own_schedules(after, base):
        return _scaled_to(first, after, base)
    if not _equal(first, after[0]):
        raise UserError(_groups_differ(f"how they relate where the first has {first:g}", after))
    return after


def _own_schedules(after: Sequence[float], base: Sequence[float] | None) -> bool:
    """Whether the saved rates are not the base ones times one factor."""
    if base is None or not any(base):
        return False
    factor = max(zip(base, after, strict=True))
    return any(not _equal(b / factor[0] * factor[1], a) for a, b in zip(after, base, strict=True))


def _groups_differ(unknown: str, after: Sequence[float]) -> str:
    remedy = (
        f"checkpoint.learning_rate={after[0]!r} analyses the step after it, whose rates were saved for every group"
        if after[0]
        else "analyse a checkpoint at which the first group has a rate above 0, by the rates saved for the step after it"
    )
    return f"the parameter groups follow schedules of their own, so {unknown} is not recorded: {remedy}"


def _base_rates(groups: Sequence[Mapping[str, Any]], scheduler: Mapping[str, Any] | None) -> list[float] | None:
    if all(_is_rate(group.get("initial_lr")) for group in groups):
        return [float(group["initial_lr"]) for group in groups]
    found = None if scheduler is None else scheduler.get("base_lrs")
    if isinstance(found, list) and len(found) == len(groups) and all(map(_is_rate, found)):
        return [float(rate) for rate in found]
    return None


def _logged(history: Sequence[Mapping[str, Any]], step: int) -> dict[int, float]:
    """Step -> rate of the rows up to `step`; of several rows of a step the last."""
    found = {}
    for row in history:
        at, rate = row.get("step"), row.get("learning_rate")
        if type(at) is int and at <= step and _is_rate(rate):
            found[at] = float(rate)
    return found


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST_LEARNING_RATE


def _perhaps_of_the_next_step(step: int, logged: Mapping[int, float], after: float) -> bool:
    """Whether the row of `step` may hold the rate of the step that follows: it is that one, and the rate was not constant."""
    if not _equal(logged[step], after):
        return False
    earlier = [s for s in logged if s < step]
    return bool(earlier) and not _equal(logged[max(earlier)], after)


def _scaled_to(first: float, after: Sequence[float], base: Sequence[float] | None) -> list[float]:
    if len(set(after)) == 1 and (base is None or len(set(base)) == 1):
        return [first] * len(after)
    ratios = base if base is not None else after
    if not ratios[0]:
        raise UserError(
            "the parameter groups have rates of their own, and how they relate is not recorded (the first is 0): analyse a "
            "checkpoint before the end of the schedule"
        )
    return [first * ratio / ratios[0] for ratio in ratios]


def _schedules(most_steps: int | None, base: float) -> Iterator[Callable[[int], float]]:
    """transformers' schedules with their default settings: step -> factor, for every number of warm-up steps."""
    n = most_steps if most_steps and most_steps > 0 else None
    for warmup in range(min(n or _MOST_WARMUP, _MOST_WARMUP) + 1):
        shapes: list[Callable[[int, int], float]] = [_constant, _inverse_square_root]
        if n is not None and warmup < n:
            shapes += [
                lambda k, w: max(0.0, (n - k) / max(1, n - w)),
                lambda k, w: max(0.0, 0.5 * (1 + math.cos(math.pi * (k - w) / max(1, n - w)))),
                lambda k, w: ((base - 1e-7) * (1 - (k - w) / max(1, n - w)) + 1e-7) / base,
            ]
        for shape in shapes:
            yield _after_warmup(shape, warmup)


def _after_warmup(shape: Callable[[int, int], float], warmup: int) -> Callable[[int], float]:
    return lambda k: k / warmup if k < warmup else shape(k, warmup)


def _constant(_step: int, _warmup: int) -> float:
    return 1.0


def _inverse_square_root(step: int, warmup: int) -> float:
    scale = warmup or 10_000
    return 1.0 / math.sqrt((step + scale - warmup) / scale)


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_SAME, abs_tol=1e-15)


def _unlogged(step: int, logged: Mapping[int, float]) -> str:
    """What is recorded, in words that fit a checkpoint of any trainer."""
    rows = ", ".join(map(str, sorted(logged)[-3:]))
    has = f"its log has steps {rows}" if rows else "it has no log"
    return f"the checkpoint does not record the learning rate of step {step} ({has})"
