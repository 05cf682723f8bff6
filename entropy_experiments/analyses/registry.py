"""Run every analysis that the configuration switches on, and let none of them fail unseen.

An analysis gives a dict for summary.json. One that does not apply says why ("skipped"); one that raises, or returns a number
that is not finite, is kept under its name with what went wrong ("error"), and fails the run unless it is told to keep going.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from entropy_experiments.analyses import adapters as steps
from entropy_experiments.analyses.adapters import NotApplicable
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from entropy_experiments.run.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Analysis:
    """name: its key in summary.json and its switch. needs: what it cannot do without, see `_missing`."""

    name: str
    run: Callable[[AnalysisInputs], dict[str, Any]]
    needs: tuple[str, ...] = ()


ANALYSES = (
    Analysis("buffers", steps.buffers),
    Analysis("entropy_prediction", steps.entropy_prediction, ("step",)),
    Analysis("higher_order", steps.higher_order, ("step", "drawn rows")),
    Analysis("attribution", steps.attribution, ("step",)),
    Analysis("intervention", steps.intervention, ("step",)),
    Analysis("prompt_structure", steps.prompt_structure, ("kernel", "step")),
    Analysis("sequence_clustering", steps.sequence_clustering, ("kernel",)),
    Analysis("weighting_schemes", steps.weighting_schemes, ("kernel", "step", "drawn rows")),
    Analysis("baselines", steps.baselines, ("step", "drawn rows")),
)
"""In the order of the report."""

_WHY_NOT = {
    "kernel": "the kernel was not computed (fisher_kernel.compute_full=false)",
    "step": "the training sequences have neither weights nor rewards, so there is no step",
    "drawn rows": "the evaluation sequences are given texts, which say nothing of the policy's entropy",
}


def _missing(inputs: AnalysisInputs, need: str) -> bool:
    if need == "kernel":
        return inputs.numbers.kernels is None
    return inputs.numbers.step is None if need == "step" else not inputs.numbers.estimand.rows_drawn


def run_analyses(
    inputs: AnalysisInputs, reporter: Reporter = SILENT, work: UnfinishedWork | None = None
) -> dict[str, dict[str, Any]]:
    """Name -> result of every analysis that `analysis:` switches on, each JSON-able, without NaN, and with a "sentence".

    work: where finished ones are kept, and not made again when the run is resumed.
    """
    switches = inputs.config.entropy_analysis.analysis
    results: dict[str, dict[str, Any]] = {}
    for analysis in ANALYSES:
        if not getattr(switches, analysis.name):
            continue
        reporter.stage(f"analysis: {analysis.name.replace('_', ' ')}")
        kept = None if work is None else work.kept(f"analyses/{analysis.name}")
        if kept is not None:
            results[analysis.name] = kept
            continue
        missing = [need for need in analysis.needs if _missing(inputs, need)]
        try:
            if missing:
                raise NotApplicable(_WHY_NOT[missing[0]])
            results[analysis.name] = _checked(analysis.run(inputs))
            if work is not None:
                work.keep(f"analyses/{analysis.name}", results[analysis.name])
        except NotApplicable as reason:
            results[analysis.name] = {"skipped": str(reason), "sentence": f"Not analysed: {reason}."}
        except Exception as error:  # whatever it is: the others still run, and the run says which one failed, and how
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            results[analysis.name] = {"error": what, "sentence": f"FAILED: {what}"}
    return results


def failed_analyses(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Name -> what went wrong, of the analyses that failed."""
    return {name: result["error"] for name, result in results.items() if "error" in result}


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    """`result` as JSON gives it back. Raises ValueError naming the place of a number that is not finite."""
    odd = next(_not_finite(result), None)
    if odd is not None:
        raise ValueError(f"its result holds a number that is not finite: {odd}")
    if not isinstance(result.get("sentence"), str):
        raise ValueError("its result says nothing: there is no sentence")
    return json.loads(json.dumps(result, allow_nan=False))


def _not_finite(tree: Any, path: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _not_finite(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from _not_finite(value, f"{path}[{place}]")
    elif isinstance(tree, float) and not math.isfinite(tree):
        yield path
