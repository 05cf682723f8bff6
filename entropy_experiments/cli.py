"""The command line. Imports of torch and its kin wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from rl_training.errors import UserError

app = typer.Typer(
    name="entropy-experiments",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Why does policy entropy fall? Train with a probe that predicts it; analyse checkpoints for what moved it.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.steps=20")
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration of the run")],
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal")] = False,
) -> None:
    """Train with Dr. GRPO and the entropy probe. Prints the run folder."""
    from rl_training.config import TrainConfig
    from rl_training.configuration import load_config

    settings = load_config(TrainConfig, config, overrides or [])
    _quiet_libraries()
    from rl_training.train import run_training

    folder = run_training(settings, quiet)
    if os.environ.get("RANK", "0") == "0":  # once, not by every process
        print(folder)


@app.command()
def analyze(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run folder (its latest checkpoint)")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML configuration of the analysis")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results folder if it exists")] = False,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Write results even if a self-check fails")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal")] = False,
) -> None:
    """Compute the cross Fisher kernel at a checkpoint and report what moves entropy. Prints the report's path last."""
    from entropy_experiments.config import FisherAnalysisConfig
    from rl_training.configuration import load_config

    settings = load_config(FisherAnalysisConfig, config, overrides or [])
    _quiet_libraries()
    from entropy_experiments.analysis_console import analyze_with_progress

    print(analyze_with_progress(checkpoint, settings, overwrite=overwrite, keep_going=keep_going, quiet=quiet).report)


@app.command()
def report(results: Annotated[Path, typer.Argument(help="Results folder of an analysis")]) -> None:
    """Write the figures and report.html of a results folder anew. Prints the report's path."""
    from entropy_experiments.report import write_report

    print(write_report(results))


@app.command()
def doctor(checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder or run folder")]) -> None:
    """Say what a checkpoint holds, what can be analysed, and what is missing and how to get it."""
    from entropy_experiments.doctor import examine

    lines, healthy = examine(checkpoint)
    print("\n".join(lines))
    if not healthy:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for the demo's runs and results")] = Path("runs"),
) -> None:
    """Train a small model until its entropy falls, analyse the checkpoint, write the report. Ten minutes on two cores."""
    _quiet_libraries()
    from entropy_experiments.demo import run_demo

    print(run_demo(output))


def _quiet_libraries() -> None:
    """Keep libraries' own progress bars and advice off the terminal; errors and warnings of ours still come through."""
    for library in ("transformers", "trl", "peft", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
