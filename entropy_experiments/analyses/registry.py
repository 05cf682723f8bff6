"""Run every analysis that the configuration switches on, and let none of them fail unseen.

An analysis returns its record (`records.analysis_results`). One that does not apply is kept as `Skipped`; one that raises, or
whose record would hold a number that is not finite, as `Failed`, and fails the run unless it is told to keep going.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from entropy_core.cut_weights import open_cut
from entropy_experiments.analyses import adapters as steps
from entropy_experiments.analyses.adapters import NotApplicable
from entropy_experiments.analyses.inputs import AnalysisInputs
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from entropy_experiments.records.analysis_results import AnalysesRecord, Failed, Skipped
from entropy_experiments.records.record import Result, explained, json_of, validated
from entropy_experiments.run.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Analysis:
    """name: its key in summary.json and its switch. needs: what it cannot do without, see `_missing`."""

    name: str
    run: Callable[[AnalysisInputs], Result]
    needs: tuple[str, ...] = ()


ANALYSES = (
    Analysis("buffers", steps.buffers),
    Analysis("entropy_prediction", steps.entropy_prediction, ("step",)),
    Analysis("higher_order", steps.higher_order, ("step", "drawn rows")),
    Analysis("attribution", steps.attribution, ("step",)),
    Analysis("intervention", steps.intervention, ("step",)),
    Analysis("prompt_structure", steps.prompt_structure, ("kernel", "step")),
    Analysis("sequence_clustering", steps.sequence_clustering, ("kernel",)),
    Analysis("weighting_schemes", steps.weighting_schemes, ("step", "drawn rows")),
    Analysis("prices", steps.prices, ("step", "drawn rows")),
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
) -> AnalysesRecord:
    """Every analysis that `analysis:` switches on.

    Args:
        inputs: the analysed checkpoint.
        reporter: is told of each analysis as it begins.
        work: where finished ones are kept, and not made again when the run is resumed.

    Returns:
        One entry an analysis: its result, or why there is none.
    """
    switches = inputs.config.entropy_analysis.analysis
    results: dict[str, Result | Skipped | Failed] = {}
    kept = {} if work is None else {a.name: work.kept(f"analyses/{a.name}") for a in ANALYSES}
    for analysis in ANALYSES:
        if not getattr(switches, analysis.name):
            continue
        reporter.stage(f"analysis: {analysis.name.replace('_', ' ')}")
        content = kept.get(analysis.name)
        if work is not None and content is not None:
            earlier = validated(AnalysesRecord, {analysis.name: content}, work.folder / "analyses")
            results[analysis.name] = getattr(earlier, analysis.name)
            continue
        missing = [need for need in analysis.needs if _missing(inputs, need)]
        try:
            if missing:
                raise NotApplicable(_WHY_NOT[missing[0]])
            found = analysis.run(inputs)
            results[analysis.name] = found
            if work is not None:
                work.keep(f"analyses/{analysis.name}", json_of(found))
        except NotApplicable as reason:
            results[analysis.name] = Skipped(skipped=str(reason))
        except ValidationError as error:  # a number that is not finite, or not in its range
            results[analysis.name] = Failed(error=f"its result is not whole: {explained(error)}")
        except Exception as error:  # whatever it is: the others still run, and the run says which one failed, and how
            # What only one process of a cut model meets (memory, a full disk) it must not go on from: the others are in this one.
            if open_cut() is not None and not isinstance(error, ValueError):
                raise
            results[analysis.name] = Failed(error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return AnalysesRecord(**results)
