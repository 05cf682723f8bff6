"""Every estimator, schedule and rival on all recorded runs, held against the truth: results/probe_replay/replay.json.

Costs are in units of one step of training: passes of one sequence, times what one takes of the step's CPU seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.probe_replay import rivals
from benchmarks.probe_replay.agreement import agreement, ceilings, pairs_of, running_coverage
from benchmarks.probe_replay.estimators import Estimator
from benchmarks.probe_replay.forecasts import forecast_figures
from benchmarks.probe_replay.pool import POOL_AGE
from benchmarks.probe_replay.pooled import PooledWatch
from benchmarks.probe_replay.runs import ROOT, find_run
from benchmarks.probe_replay.schedules import CriticSettings, Filter, Gradient, Held, Series, Snis, Watch
from benchmarks.probe_replay.tape import Tape, load_tape

RESULTS = Path("benchmarks/results/probe_replay")
LEAST_STEPS = 5
KINDS = ("small", "turning", "aged", "agedturning", "smollm2")
WATCHES = {
    "accurate": PooledWatch(64, 2),
    "default": PooledWatch(40, 4),
    "light": PooledWatch(16, 4),
}
"""The probe's presets, as it watches a pool."""


@dataclass(frozen=True)
class Case:
    """forward, backward, drawn: sequences of each kind a step. series: of a tape. needs: arrays a recording must have. watch: of
    a pool as the probe watches it, whose passes are those of its spans.
    """

    group: str
    name: str
    series: Callable[[Tape], Series]
    forward: float = 0.0
    backward: float = 0.0
    drawn: float = 0.0
    needs: str = ""
    watch: PooledWatch | None = None


def _pool(decay: float, n: int = 64, every: int = 1, **more: Any) -> Case:
    estimator = Estimator("moved", "td", decay, more.pop("with_critic", True))
    watch = Watch(estimator, n, "pool", every=every, **more)
    return Case("pool", "", watch.series, forward=n * watch.ages / POOL_AGE / every, drawn=n / POOL_AGE)


def _watched(name: str, watch: PooledWatch) -> Case:
    return Case("watch", name, watch.series, drawn=watch.n / POOL_AGE, watch=watch)


def _named(name: str, case: Case) -> Case:
    return Case(case.group, name, case.series, case.forward, case.backward, case.drawn)


def _own(name: str, estimator: Estimator, **more: Any) -> Case:
    n, gradient = more.get("n", 64), not estimator.tokens.startswith("moved")
    needs = {"along": "along", "crossed": "own_part", "along_momentum": "along"}.get(estimator.tokens, "")
    watch = Watch(estimator, **more)
    return Case("own", name, watch.series, forward=0 if gradient else n, backward=n if gradient else 0, needs=needs)


def _held(name: str, estimator: Estimator) -> Case:
    gradient = not estimator.tokens.startswith("moved")
    needs = "held_along" if gradient else ""
    series = Held(estimator).series
    return Case(
        "fresh", name, series, forward=0 if gradient else 128, backward=64 if gradient else 0, drawn=64, needs=needs
    )


def _gradient(name: str, gradient: Gradient) -> Case:
    n = gradient.n / gradient.refresh
    return Case("gradient", name, gradient.series, forward=n, backward=n, needs="lagged")


def cases() -> list[Case]:
    """All rows of the table."""
    e, td = Estimator, "td"
    filtered: dict[str, Any] = {"filter": Filter()}
    own = [
        _own("split", e("along", "split")),
        _own("Rao-Blackwell", e("along", "rao_blackwell")),
        _own("Rao-Blackwell without its own H_k", e("along", "without_own")),
        _own("score function", e("along", "score")),
        _own("fixed prefix", e("along", "fixed_prefix")),
        *(_own(f"critic, lambda {d:g}", e("along", td, d)) for d in (1.0, 0.9, 0.5)),
        _own("crossed over prompts, critic, lambda 0.9", e("crossed", td, 0.9)),
        _own("momentum's part scaled, critic, lambda 0.9", e("along_momentum", td, 0.9)),
        *(_own(f"watched, lambda {d:g}", e("moved", td, d)) for d in (1.0, 0.9, 0.5)),
        _own("watched, lambda 0.5, corrected", e("moved", td, 0.5), correction=0.9),
        _own("watched, momentum's part scaled, lambda 0.9", e("moved_momentum", td, 0.9)),
        _own("watched, lambda 0.9, filtered", e("moved", td, 0.9), **filtered),
        Case("own", "SNIS", Snis().series, forward=64),
    ]
    pool = [
        Case("pool", "SNIS", Snis(source="pool").series, forward=64, drawn=8),
        _named("no critic, lambda 1", _pool(1.0, with_critic=False)),
        _named("no critic, lambda 0.9", _pool(0.9, with_critic=False)),
        _named("critic without the hidden state, lambda 0.95", _pool(0.95, critic=CriticSettings(hidden=False))),
        *(_named(f"lambda {d:g}", _pool(d)) for d in (1.0, 0.95, 0.9, 0.7, 0.5, 0.0)),
        *(_named(f"lambda {d:g}, corrected", _pool(d, correction=0.9)) for d in (0.9, 0.5)),
        _named("lambda 0.5, corrected, filtered", _pool(0.5, correction=0.9, **filtered)),
        *(_named(f"lambda 0.95, filtered, n {n}", _pool(0.95, n, **filtered)) for n in (64, 48, 32, 16, 8)),
        _named("lambda 0.95, filtered, n 64, younger than 4 steps", _pool(0.95, ages=4, **filtered)),
        _named("lambda 0.95, filtered, n 64, younger than 2 steps", _pool(0.95, ages=2, **filtered)),
        _named(
            "lambda 0.95, filtered, n 64, critic keep 0.97", _pool(0.95, critic=CriticSettings(keep=0.97), **filtered)
        ),
        _named("lambda 0.95, filtered, n 64, every 2nd step", _pool(0.95, 64, 2, **filtered)),
        _named("lambda 0.95, filtered, n 64, every 4th step", _pool(0.95, 64, 4, **filtered)),
    ]
    fresh = [
        _held("split", e("along", "split")),
        _held("Rao-Blackwell without its own H_k", e("along", "without_own")),
        *(_held(f"critic, lambda {d:g}", e("along", td, d)) for d in (0.9, 0.5)),
        *(_held(f"watched, lambda {d:g}", e("moved", td, d)) for d in (1.0, 0.9, 0.5)),
    ]
    split, without = e("along", "split"), e("along", "without_own")
    gradient = [
        _gradient("probe's default until now (split, 16, every 2nd step)", Gradient(split, refresh=2)),
        _gradient("probe's accurate until now (split, 16, every step)", Gradient(split)),
        _gradient("16, averaging by step", Gradient(without, refresh=2, per_step=True)),
        _gradient("16, score half averaged alone", Gradient(without, score_only=True)),
        _gradient("64, averaging 0.75", Gradient(without, n=64, per_prompt=None)),
        _gradient("64, score half averaged alone", Gradient(without, n=64, per_prompt=None, score_only=True)),
    ]
    renewed = PooledWatch(64)
    watch = [
        *(_watched(f"{name}: n {w.n}, spans of up to {w.span}", w) for name, w in WATCHES.items()),
        _watched("n 64, every step", renewed),
        _watched("n 64, every step, no filter", replace(renewed, filter="none")),
        _watched("n 64, every step, local trend", replace(renewed, filter="trend")),
        _watched("n 64, every step, lambda 0.95", replace(renewed, decay=0.95)),
        _watched("n 64, every step, never drawn early", replace(renewed, renewed=False)),
        _watched("n 64, every step, never drawn early, no filter", replace(renewed, renewed=False, filter="none")),
        _watched("n 64, spans of up to 4", PooledWatch(64, 4)),
        _watched("n 32, spans of up to 4", PooledWatch(32, 4)),
        *(_watched(f"{name}, no filter", replace(w, filter="none")) for name, w in WATCHES.items()),
        *(_watched(f"{name}, local trend", replace(w, filter="trend")) for name, w in WATCHES.items()),
    ]
    return [*watch, *own, *pool, *fresh, *gradient]


def rival_series(tape: Tape) -> dict[str, tuple[Series, str]]:
    """Name -> (series, what it needs of a recording)."""
    found: dict[str, tuple[Series, str]] = {
        "persistence": (rivals.persistence(tape), ""),
        "slope of the logged entropy": (rivals.entropy_slope(tape), ""),
    }
    found |= {name: (series, "") for name, series in rivals.token_rival_series(tape).items()}
    if tape.has("along"):
        score = Watch(Estimator("along", "score")).series(tape)
        found |= {"score function": (score, "along"), "no momentum": (rivals.without_momentum(tape), "along")}
    return found


def replay(tapes: list[Tape], timed: list[Tape]) -> dict[str, Any]:
    """Everything that the page is made of. timed: recordings that costs are taken from, be they too short for the rest."""
    of_kind = {k: [t for t in tapes if kind_of(t.name) == k] for k in KINDS}
    of_kind["all"] = [t for t in tapes if not t.name.startswith("aged")]
    out: dict[str, Any] = {
        "runs": {t.name: _run(t) for t in tapes},
        "ceilings": {k: ceilings(pairs_of(some, [list(t.truth) for t in some])) for k, some in of_kind.items() if some},
        "rows": [],
        "token_r_squared": {t.name: rivals.token_r_squared(t) for t in tapes},
    }
    for case in cases():
        some = [t for t in tapes if t.has(case.needs)]
        if some:
            # What ages do is said of the watch alone; older rows are of the runs that hold all that is recorded.
            some = some if case.watch is not None else [t for t in some if not t.name.startswith("aged")]
            series = [case.series(t) for t in some]
            kinds = _by_kind(some, series)
            if case.watch is not None:
                for kind, found in kinds.items():
                    of_it = [t for t in some if kind == kind_of(t.name) or (kind == "all" and "aged" not in t.name)]
                    found |= _of_watch(case.watch, of_it)
            out["rows"].append({"group": case.group, "name": case.name, "kinds": kinds, **_costs(case, timed)})
            figures = " | ".join(f"{k} {v['r']:.2f} {v['partial']:.2f} {v['sum']:.2f}" for k, v in kinds.items())
            print(f"{case.group:9s} {case.name:52s} {figures}", flush=True)
    out["forecasts"] = {
        name: {k: forecast_figures(some, watch) for k, some in of_kind.items() if some and k not in ("all", "smollm2")}
        for name, watch in WATCHES.items()
    }
    tapes = [t for t in tapes if not t.name.startswith("aged")]
    by_run = [rival_series(t) for t in tapes]
    for name in by_run[0]:
        some = [(t, found[name][0]) for t, found in zip(tapes, by_run, strict=True) if name in found]
        kinds = _by_kind([t for t, _ in some], [s for _, s in some])
        out["rows"].append({"group": "rival", "name": name, "kinds": kinds, "cost": {}})
    return out


def _of_watch(watch: PooledWatch, tapes: list[Tape]) -> dict[str, float]:
    """looks: passes a step; running: share of spans after which the 95% interval of the running sum holds the change so far."""
    measured = [watch.measured(t) for t in tapes]
    looks = sum(map(len, measured)) / sum(map(len, tapes))
    return {"looks": looks, "running": running_coverage(tapes, measured)}


def _by_kind(tapes: list[Tape], series: list[Series]) -> dict[str, Any]:
    """Agreement over all runs, and over the runs of each kind."""
    kinds = {"all": [i for i, t in enumerate(tapes) if not t.name.startswith("aged")]}
    kinds |= {k: [i for i, t in enumerate(tapes) if kind_of(t.name) == k] for k in KINDS}
    return {
        kind: agreement(pairs_of([tapes[i] for i in some], [series[i] for i in some]))
        for kind, some in kinds.items()
        if some
    }


def kind_of(run: str) -> str:
    """`small` of `small-0`."""
    return run.split("-")[0]


def _run(tape: Tape) -> dict[str, Any]:
    levels = [step.held.h for step in tape.steps]
    pairs = pairs_of([tape], [list(tape.truth)])
    residual = max(s.numbers["step_residual"] for s in tape.steps)
    truth, error = (np.array([getattr(t, name) for t in tape.truth]).tolist() for name in ("value", "error"))
    watched = WATCHES["default"].series(tape)
    own = Watch(Estimator("moved", "td", 0.95), 64, "own").series(tape)
    return {
        "steps": len(tape),
        "entropy": levels,
        "truth": truth,
        "truth_error": error,
        "from_fresh": sum(tape.from_fresh),
        "ceilings": ceilings(pairs),
        "cpu_seconds": _run_seconds(tape),
        "largest_step_residual": residual,
        "pool": [[e.value, e.error] for e in watched if e is not None],
        "own": [[e.value, e.error] for e in own if e is not None],
    }


def _costs(case: Case, tapes: list[Tape]) -> dict[str, Any]:
    """Sequences a step of each kind, and the share of a step's CPU seconds by kind of run."""
    shares: dict[str, float] = {}
    for tape in tapes:
        seconds = _run_seconds(tape)
        kinds = (("forward", case.forward), ("backward", case.backward), ("draw", case.drawn))
        if all(f"cpu_{kind}_per_sequence" in seconds for kind, count in kinds if count):
            total = sum(count * seconds.get(f"cpu_{kind}_per_sequence", 0.0) for kind, count in kinds)
            shares.setdefault(kind_of(tape.name), total / seconds["cpu_step"])
    passes = {"forward": case.forward, "backward": case.backward, "drawn": case.drawn}
    return {"passes": passes, "cost": shares}


def _run_seconds(tape: Tape) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for step in tape.steps:
        for name, value in step.numbers.items():
            if name.startswith("cpu_"):
                found.setdefault(name, []).append(value)
    # The first step tries out how prompts can be shared.
    found = {name: values[1:] or values for name, values in found.items()}
    return {n: float(np.median(values)) for n, values in found.items()}


def replay_all() -> None:
    """Replay what is recorded under runs/probe_replay/ and write the results."""
    torch.set_num_threads(1)
    names = sorted(path.parent.name for path in ROOT.glob("*/steps") if kind_of(path.parent.name) in KINDS)
    timed = [load_tape(name, find_run(name).folder) for name in names]
    tapes = [t for t in timed if len(t) >= LEAST_STEPS]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "replay.json").write_text(json.dumps(_rounded(replay(tapes, timed))) + "\n")


def _rounded(value: Any) -> Any:
    """Five digits of every number."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
