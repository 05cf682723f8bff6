"""What a person sees while an analysis runs: a progress bar over its stages, then the verdict in a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console.progress import StageProgress, progress_console
from entropy_experiments.console.tables import print_sentences, print_verdict
from entropy_experiments.entropy_runner import FisherAnalysis, RunOptions, run_fisher_analysis
from entropy_experiments.report.outcome import read_outcome
from entropy_experiments.report.precision_finding import precision_sentences
from rl_training.run.launched import is_first

# Seconds the stages take on SmolLM2-135M with 64 x 64 sequences, in forward passes over a buffer: what the bar advances by.
_FORWARD = 1.0
_BEFORE = {
    "loading the checkpoint": 0.6,
    "drawing the training buffer": 4.4,
    "drawing the evaluation buffer": 2.4,
    "training gradients, one row per sequence": 6.8,
    "token statistics": 1.1,
    "evaluation gradients and kernels": 7.2,
    "the training buffer's own kernel": 7.8,
    "checking the kernel against finite differences": 0.6,
}
_WITHOUT_ROWS = {
    **{name: _BEFORE[name] for name in list(_BEFORE)[:3]},
    "gradient of the training loss": 4.2,
    "token statistics": 1.1,
    "predictions, along the step and its parts": 16.5,
    "checking the kernel against finite differences": 0.1,
}
_REMOVALS, _WEIGHTINGS, _PRICES = 8, 15, 17
_OF_A_WEIGHTING = 8.2
"""Without kernels: a gradient, and a pass in forward mode."""


def expected_shares(config: FisherAnalysisConfig) -> dict[str, float]:
    """Expected time of every stage of an analysis with this configuration, relative to the others, in their order."""
    settings, full = config.entropy_analysis.analysis, config.entropy_analysis.fisher_kernel.compute_full
    scales = sorted({*settings.step_scales, 1.0})
    passes = {  # in the order of analyses_runner.ANALYSES
        "buffers": 0.1,
        "entropy_prediction": 2.8 * len(settings.fresh_scales) + 0.1,
        "higher_order": 2.0 * sum(s <= 1 for s in scales),
        "attribution": 3.3,
        "intervention": settings.intervention_subsets + _REMOVALS,
        "prompt_structure": 0.1,
        "sequence_clustering": 0.1,
        "weighting_schemes": (_WEIGHTINGS if settings.weighting_steps else 0.1)
        + (0.0 if full else _OF_A_WEIGHTING * _WEIGHTINGS),
        "prices": _PRICES + (_WEIGHTINGS if settings.price_steps else 0),
        "baselines": 0.1,
    }
    stages = dict(_BEFORE if full else _WITHOUT_ROWS)
    if settings.entropy_prediction:
        stages |= {f"measuring at {s:g} x the step": _FORWARD for s in scales} | {"checking the slope": 2.1}
    stages["noise of the training side"] = 2.0
    stages |= {
        f"analysis: {name.replace('_', ' ')}": _FORWARD * n for name, n in passes.items() if getattr(settings, name)
    }
    return stages | {"writing the results": 0.5}


def analyze_with_progress(
    checkpoint: Path,
    config: FisherAnalysisConfig,
    *,
    quiet: bool = False,
    table: bool = True,
    **options: Unpack[RunOptions],
) -> FisherAnalysis:
    """run_fisher_analysis with progress on stderr and, where `table` is set, the closing table there as well."""
    console = progress_console(quiet or not is_first())
    with StageProgress(console, expected_shares(config)) as progress:
        analysis = run_fisher_analysis(checkpoint, config, reporter=progress, **options)
    if table and not quiet:
        print_verdict(console, read_outcome(analysis.folder))
        print_sentences(console, precision_sentences(analysis.summary))
    return analysis
