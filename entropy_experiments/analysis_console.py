"""What a person sees while an analysis runs: a progress bar over its stages, then the verdict and the self-checks."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.entropy_runner import FisherAnalysis, run_fisher_analysis
from entropy_experiments.report_analyses import analysis_sections
from entropy_experiments.results_folder import read_results_folder
from entropy_experiments.verdict import write_verdict

# Seconds the stages take relative to one another on SmolLM2-135M with 64 x 64 sequences: what the bar advances by. Stages
# not named here count as one forward pass.
_SHARES = {
    "loading the checkpoint": 3.0,
    "drawing the training buffer": 8.0,
    "drawing the evaluation buffer": 4.0,
    "training gradients, one row per sequence": 8.0,
    "token statistics": 3.0,
    "evaluation gradients and kernels": 20.0,
    "the training buffer's own kernel": 10.0,
    "checking the kernel against finite differences": 4.0,
    "checking the slope": 3.0,
    "writing the results": 6.0,
}
_FORWARD = 1.5
_REMOVALS, _WEIGHTINGS = 8, 15


def _expected(config: FisherAnalysisConfig) -> dict[str, float]:
    """Share of every stage of an analysis with this configuration."""
    settings = config.entropy_analysis.analysis
    scales = {*settings.step_scales, 1.0}
    passes = {  # forward passes over the evaluation buffer
        "buffers": 0.1,
        "entropy_prediction": 4.0 * len(settings.fresh_scales),
        "higher_order": 2.0 * sum(s <= 1 for s in scales),
        "attribution": 3.0,
        "intervention": settings.intervention_subsets + _REMOVALS,
        "prompt_structure": 0.5,
        "sequence_clustering": 2.0,
        "weighting_schemes": _WEIGHTINGS if settings.weighting_steps else 0.5,
        "baselines": 0.1,
    }
    stages = {f"measuring at {s:g} x the step": _FORWARD for s in scales if settings.entropy_prediction}
    stages |= {
        f"analysis: {name.replace('_', ' ')}": _FORWARD * n for name, n in passes.items() if getattr(settings, name)
    }
    return _SHARES | stages


def analyze_with_progress(
    checkpoint: Path,
    config: FisherAnalysisConfig,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    keep_going: bool = False,
    quiet: bool = False,
) -> FisherAnalysis:
    """run_fisher_analysis with a bar on stderr (plain lines where there is no terminal) and a closing verdict."""
    console = Console(stderr=True, highlight=False, quiet=quiet)
    shares = _expected(config)
    total = sum(shares.values())
    done, current = 0.0, 0.0
    with Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    ) as progress:
        bar = progress.add_task("starting", total=total)

        def stage(name: str) -> None:
            nonlocal done, current
            done, current = done + current, shares.get(name, _FORWARD)
            progress.update(bar, description=name, completed=done)
            if not console.is_terminal:
                console.print(f"analysis: {name}")

        analysis = run_fisher_analysis(
            checkpoint, config, folder=folder, overwrite=overwrite, keep_going=keep_going, stage=stage
        )
        progress.update(bar, description="done", completed=total)
    _print_verdict(console, analysis)
    return analysis


def _print_verdict(console: Console, analysis: FisherAnalysis) -> None:
    results = read_results_folder(analysis.folder)
    prompts = [row["prompt"] for row in [*results.training, *results.evaluation]]
    console.print()
    for sentence in write_verdict(
        results.summary, results.history, results.run["self_checks"], results.training, prompts
    ):
        console.print(f"- {sentence.text}", markup=False, soft_wrap=True)
    for section in analysis_sections(results.summary):
        console.print(f"- {section.question} {section.sentence}", markup=False, soft_wrap=True)
    for check in analysis.numbers.checks:
        mark = "ok  " if check.passed else "FAIL"
        console.print(
            f"  {mark} {check.name}: {check.value:.2g} (allowed {check.tolerance:g})", markup=False, soft_wrap=True
        )
