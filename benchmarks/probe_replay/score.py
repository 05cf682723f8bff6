"""A public benchmark of entropy predictors: what may be seen before a step, the truth after it, and a score in a minute.

    python -m benchmarks.probe_replay pack RUN...              recordings -> results/probe_replay/records/<run>.npz
    python -m benchmarks.probe_replay score                    the rivals of the literature on these records
    python -m benchmarks.probe_replay score MODULE:FUNCTION    one of your own among them

    def predict(step: BeforeStep) -> float        change of entropy that the coming step makes, nats per token, or any scale

A record holds what the step trains on, under the policy before it, and no more: a predictor that needs weights or gradients has
to be replayed on a whole recording (replay.py). Truths and scores are tape.py's and agreement.py's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.probe_replay.agreement import agreement, pairs_of
from benchmarks.probe_replay.rivals import SLOPE_STEPS, token_rivals
from benchmarks.probe_replay.tape import Estimated, Sequences, Tape

RECORDS = Path("benchmarks/results/probe_replay/records")
_TOKENS = {"logprob": np.float16, "entropy": np.float16, "sharpness": np.float16}
_EACH = {"length": np.int16, "prompt": np.int16, "advantage": np.float32, "weight": np.float32, "omega": np.float32}
_STEP = {"truth": np.float32, "error": np.float32, "learning_rate": np.float32}


@dataclass(frozen=True)
class BeforeStep:
    """What is known before a step of the optimizer.

    own: its sequences under the policy as it is: `mask`, `logprob`, `entropy` (N, T), `prompt` (N,), `omega` (N,) of the way that
    prompts were drawn, and in `extra` `advantage` and `weight` (N,) and `sharpness` (N, T), sum_a pi_a^2 (log pi_a + H). earlier:
    the steps before it, the oldest first.
    """

    own: Sequences
    learning_rate: float
    earlier: tuple[BeforeStep, ...]


Predictor = Callable[[BeforeStep], float]


@dataclass(frozen=True)
class Record:
    """A run: its steps, and what each truly did, which no predictor sees."""

    name: str
    steps: list[BeforeStep]
    truth: list[Estimated]

    def __len__(self) -> int:
        return len(self.steps)


def pack(tape: Tape, path: Path) -> None:
    """Write a recording's record."""
    widest = max(step.own.mask.shape[1] for step in tape.steps)

    def padded(values: torch.Tensor) -> np.ndarray:
        return np.pad(values.numpy(), ((0, 0), (0, widest - values.shape[1])))

    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_TOKENS, *_EACH, *_STEP)}
    for step, truth in zip(tape.steps, tape.truth, strict=True):
        own = step.own
        known = {name: getattr(own, name) for name in ("logprob", "entropy", "prompt", "length", "omega")} | own.extra
        for name in _TOKENS:
            columns[name].append(padded(known[name]))
        for name in _EACH:
            columns[name].append(known[name].numpy())
        for name, value in zip(_STEP, (truth.value, truth.error, step.numbers["learning_rate"]), strict=True):
            columns[name].append(np.array(value))
    kinds = {**_TOKENS, **_EACH, **_STEP}
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: np.stack(values).astype(kinds[name]) for name, values in columns.items()}
    np.savez_compressed(path, **arrays)


def load(path: Path) -> Record:
    """A record as it was packed."""
    arrays = {name: torch.from_numpy(values) for name, values in np.load(path).items()}
    steps: list[BeforeStep] = []
    for t in range(len(arrays["truth"])):
        of = {name: values[t].double() for name, values in arrays.items()}
        mask = torch.arange(of["logprob"].shape[1]) < of["length"][:, None]
        unknown = torch.full_like(of["logprob"], torch.nan)
        extra = {name: of[name] for name in ("advantage", "weight", "sharpness")}
        pair = (of["logprob"], of["entropy"])
        own = Sequences(mask, arrays["prompt"][t].long(), of["omega"], *pair, unknown, unknown, extra=extra)
        steps.append(BeforeStep(own, float(of["learning_rate"]), tuple(steps)))
    truth = [Estimated(float(v), float(e)) for v, e in zip(arrays["truth"], arrays["error"], strict=True)]
    return Record(path.stem, steps, truth)


def entropy_slope(step: BeforeStep) -> float:
    """Least-squares slope of the logged entropy over the last five steps, this one's included."""
    levels = [one.own.h for one in (*step.earlier, step)[-SLOPE_STEPS:]]
    return float(np.polyfit(range(len(levels)), levels, 1)[0]) if len(levels) > 1 else 0.0


def rivals() -> dict[str, Predictor]:
    """Those that see no more than a record holds."""
    found: dict[str, Predictor] = {"slope of the logged entropy": entropy_slope}
    for name in ("covariance", "covariance, natural", "S*", "STEER", "REPO"):
        found[name] = lambda step, name=name: token_rivals(step.own, step.learning_rate)[name]
    return found


def find(name: str) -> Predictor:
    """The function of `module:function`.

    Raises:
        SystemExit: there is none of that name.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"{name}: {error}; write it as module:function, importable from here") from error


def score(predictor: Predictor, records: Sequence[Record]) -> dict[str, float | tuple[float, float]]:
    """`agreement` of a predictor with the truth over all steps of all records.

    Raises:
        SystemExit: a prediction that is no finite number.
    """
    series = []
    for record in records:
        values = [float(predictor(step)) for step in record.steps]
        if not np.isfinite(values).all():
            raise SystemExit(
                f"{record.name}: step {int(np.argmin(np.isfinite(values)))} is predicted as no finite number"
            )
        series.append([Estimated(value, float("nan")) for value in values])
    return agreement(pairs_of(records, series))


def table(predictors: Mapping[str, Predictor], records: Sequence[Record]) -> str:
    """Markdown, the highest correlation first."""
    kinds = {"all": list(records)} if len(records) > 1 else {}
    kinds |= {record.name: [record] for record in records}
    found = {name: {kind: score(p, some) for kind, some in kinds.items()} for name, p in predictors.items()}
    order = sorted(found, key=lambda name: -float(next(iter(found[name].values()))["r"]))  # pyright: ignore[reportArgumentType]
    head = " | ".join(f"{kind}: r | beyond persistence" for kind in kinds)
    lines = [f"| predictor | {head} |", "|---" * (1 + 2 * len(kinds)) + "|"]
    for name in order:
        cells = [_cell(of, quantity) for of in found[name].values() for quantity in ("r", "partial")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, float | tuple[float, float]], name: str) -> str:
    low, high = found[f"{name}_interval"]  # pyright: ignore[reportGeneralTypeIssues]
    return f"{found[name]:.2f} [{low:.2f}, {high:.2f}]"


def main(names: Sequence[str]) -> None:
    """Print the table, with the predictors named."""
    records = [load(path) for path in sorted(RECORDS.glob("*.npz"))]
    if not records:
        raise SystemExit(
            f"no records under {RECORDS}: python -m benchmarks.probe_replay record small-0, then pack small-0"
        )
    print(table({**rivals(), **{name: find(name) for name in names}}, records))
