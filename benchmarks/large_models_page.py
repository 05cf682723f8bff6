"""benchmarks/results/large_models/README.md, from the measurements beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from rl_training.files import write_whole

_CORES = 2
_GIB = 2**30
_PARAMETERS = {"lora-128": 87.9e6, "full-128": 134.5e6}
_KERNEL_STAGES = (
    "training gradients, one row per sequence",
    "evaluation gradients and kernels",
    "the training buffer's own kernel",
)


def write_page(results: Path, cases: Mapping[str, Any]) -> None:
    """README.md beside measurements.jsonl: the latest of every case that ended, and its error.

    Args:
        cases: name -> benchmarks.large_models.Case.
    """
    lines = [json.loads(line) for line in (results / "measurements.jsonl").read_text().splitlines()]
    latest = {line["case"]: line for line in lines if line.get("status") == 0}
    errors = {line["case"]: line["error"] for line in lines if "error" in line}
    floors = {line["case"]: line for line in lines if "floor" in line}
    parts = (_page(latest, errors, cases), _floors(latest, floors, cases), _growth(latest, cases))
    write_whole(results / "README.md", "\n".join(line for part in parts for line in part) + "\n")


def _floors(
    latest: dict[str, dict[str, Any]], floors: dict[str, dict[str, Any]], cases: Mapping[str, Any]
) -> Iterator[str]:
    """What the stages of the kernels took over the least that they take."""
    if not floors:
        return
    yield from ["", "## Over the floor", ""]
    yield "The three stages of the kernels against what `floor` measures: plain forward and backward passes over the same"
    yield "sequences, and one product of random rows of the same size (its part in brackets). Passes grow with sequences times"
    yield "parameters, the product with evaluation times training sequences times parameters."
    yield ""
    yield "| case | parameters | evaluation × training | kernels, CPU s | floor, CPU s | ratio |"
    yield "|---|---|---|---|---|---|"
    for name, line in floors.items():
        if name not in latest:
            continue
        taken, least = _stage_seconds(latest[name], _KERNEL_STAGES), sum(line["floor"].values())
        product = sum(value for key, value in line["floor"].items() if key.endswith("product"))
        case = cases[name]
        yield (
            f"| `{name}` | {line['parameters'] / 1e6:.1f} M | {case.n_eval} × {case.n_train} | {taken:.0f} | {least:.0f} "
            f"({product:.0f}) | {taken / least:.1f} |"
        )


def _growth(latest: dict[str, dict[str, Any]], cases: Mapping[str, Any]) -> Iterator[str]:
    """CPU seconds of the kernels against sequences, by least squares, and against trained parameters."""
    names = [name for name, case in cases.items() if case.run == "full" and case.matrix and name in latest]
    if len(names) < 3:
        return
    sizes = np.array([(cases[name].n_eval, cases[name].n_train) for name in names], dtype=float)
    taken = np.array([_stage_seconds(latest[name], _KERNEL_STAGES) for name in names])
    terms = np.stack([sizes.sum(1), sizes.prod(1)], 1)
    each, pair = nnls(terms / taken[:, None], np.ones(len(names)))[0]
    yield from ["", "## How it grows", ""]
    yield "CPU seconds of the same stages, all weights of SmolLM2-135M trained, and the best a (n + m) + b n m of n"
    yield f"evaluation and m training sequences (least squares of relative errors): a = {each:.2f} s, b = {1e3 * pair:.1f} ms."
    yield ""
    yield "| case | evaluation × training | kernels, CPU s | fitted |"
    yield "|---|---|---|---|"
    for name, (n, m), seconds, fitted in zip(names, sizes, taken, terms @ [each, pair], strict=True):
        yield f"| `{name}` | {n:.0f} × {m:.0f} | {seconds:.0f} | {fitted:.0f} |"
    other = _PARAMETERS["lora-128"] / _PARAMETERS["full-128"]
    if "lora-128" in latest and "full-128" in latest:
        adapter, whole = (_stage_seconds(latest[name], _KERNEL_STAGES) for name in ("lora-128", "full-128"))
        yield ""
        yield (
            f"Against parameters: LoRA of r = 288 has {other:.2f} times the trained parameters of the whole model and takes "
            f"{adapter / whole:.2f} times its kernels' time at 128 × 256: its passes go through base weights and adapter."
        )


def _stage_seconds(line: dict[str, Any], names: tuple[str, ...]) -> float:
    ends = [*(stage["cpu"] for stage in line["stages"][1:]), line["cpu"]]
    pairs = zip(line["stages"], ends, strict=True)
    return sum(end - stage["cpu"] for stage, end in pairs if stage["line"].partition(" (stage")[0] in names)


def _page(latest: dict[str, dict[str, Any]], errors: dict[str, float], cases: Mapping[str, Any]) -> Iterator[str]:
    yield "# Models that are trained whole, and large adapters"
    yield ""
    yield "`python -m benchmarks.large_models`; targets in brackets. Minutes are CPU seconds / 120: what two cores take at least"
    yield "that nothing else uses. Wall time is of a machine that others were using. Disk of the first four was looked at between"
    yield "stages alone: by its plan `lora-128` has up to 39.9 GiB within one."
    yield ""
    yield "| case | evaluation × training | memory, GiB | CPU s | minutes | wall, min | disk, GiB | error of K₁ | checks |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, case in cases.items():
        size = f"{case.n_eval} × {case.n_train}" + ("" if case.matrix else ", no matrix")
        line = latest.get(name)
        if line is None:
            targets = (f"[{_number(value)}]" for value in (case.gib, case.minutes, case.disk))
            yield "| `{}` | {} | not run {} | | {} | | {} | | |".format(name, size, *targets)
            continue
        checks = line["self_checks"] or []
        passed = sum(one["passed"] for one in checks)
        error = f"{errors[name]:.1e}" if name in errors else "–"
        yield (
            f"| `{name}` | {size} | {line['peak'] / _GIB:.2f} [{_number(case.gib)}] | {line['cpu']:.0f} | "
            f"{line['cpu'] / 60 / _CORES:.1f} [{_number(case.minutes)}] | {line['wall'] / 60:.0f} | "
            f"{line['disk'] / _GIB:.2f} [{_number(case.disk)}] | {error} | {passed} of {len(checks)} |"
        )
    for name, line in latest.items():
        yield from ["", f"## {name}", "", f"`{line['command']}`", ""]
        versions, hardware = line["environment"]["versions"], line["environment"]["hardware"]
        yield f"torch {versions['torch']}, {line['threads']} threads on {hardware['processor']}, load {line['load']:.0f}."
        yield from ["", "| stage | CPU s | peak so far, GiB |", "|---|---|---|"]
        ends = [*(stage["cpu"] for stage in line["stages"][1:]), line["cpu"]]
        for stage, end in zip(line["stages"], ends, strict=True):
            if "(stage " in stage["line"]:
                yield f"| {stage['line'].partition(' (stage')[0]} | {end - stage['cpu']:.0f} | {stage['peak'] / _GIB:.2f} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
