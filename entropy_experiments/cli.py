"""The command line. Imports of torch and its kin wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_experiments.console.ledger import ledger
from entropy_experiments.run.endings import run_to_the_end
from entropy_experiments.run.quiet_libraries import quiet_libraries, stdout_kept_for_results
from entropy_experiments.text.display import visible
from rl_training.errors import UserError
from rl_training.run.launched import is_first

if TYPE_CHECKING:
    from entropy_experiments.config import FisherAnalysisConfig

app = typer.Typer(
    name="entropy-experiments",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Why does policy entropy fall? Train with a probe that predicts it; analyse checkpoints for what moved it.",
)


@app.callback()
def every_command(
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of what ends a command; may stand anywhere")
    ] = False,
) -> None:
    """Options of every command. `--debug` is taken off the command line before it is parsed (run_to_the_end)."""


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.steps=20")
]
AnalysisOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. entropy_analysis.eval_batch_size=64"),
]

Trust = Annotated[
    bool,
    typer.Option("--trust", help="You trust who made the checkpoint: its task may open files, import and evaluate"),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration of the run")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint, if any")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal")] = False,
) -> None:
    """Train with Dr. GRPO and the entropy probe. Prints the run folder."""
    from rl_training.config import TrainConfig
    from rl_training.configuration import load_config

    settings = load_config(TrainConfig, config, overrides or [])
    quiet_libraries()
    from rl_training.train import run_training

    folder = run_training(settings, quiet, resume)
    if is_first():  # once, not by every process
        print(folder)


@app.command()
def analyze(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run folder (its latest checkpoint)")],
    overrides: AnalysisOverrides = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML configuration of the analysis")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results folder if it exists")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only: memory, disk, passes and time")] = False,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, help="With --dry-run: plan for so many devices, without loading anything"),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", min=1.0, help="With --devices: bytes per second of each, to others and disk")
    ] = 50e9,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Write results even if a self-check fails")] = False,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal, and no table")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print verdict, numbers and paths as one JSON object")
    ] = False,
) -> None:
    """Compute the cross Fisher kernel at a checkpoint and report what moves entropy. Prints the report's path last."""
    from entropy_experiments.config import FisherAnalysisConfig
    from entropy_experiments.console.early_refusals import refuse_checkpoint_early
    from rl_training.configuration import load_config

    settings = load_config(FisherAnalysisConfig, config, overrides or [])
    if resume and overwrite:
        raise UserError("--resume goes on with what is there, --overwrite throws it away: take one of them")
    refuse_checkpoint_early(checkpoint, settings, trust)
    if devices is not None and not dry_run:
        raise UserError("--devices plans an analysis on paper: say --dry-run as well")
    if dry_run:
        return _print_forecast(checkpoint, settings, trust, as_json, devices, bandwidth)
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.console.analyze import analyze_with_progress

        options = {"overwrite": overwrite, "resume": resume, "keep_going": keep_going, "trust": trust, "quiet": quiet}
        analysis = analyze_with_progress(checkpoint, settings, table=not as_json, **options)
    if as_json:
        from entropy_experiments.records.record import json_of
        from entropy_experiments.report.outcome import read_outcome

        _print_json({"command": "analyze", **json_of(read_outcome(analysis.folder))})
    else:
        print(analysis.report)


@app.command()
def price(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, or a run folder (its latest checkpoint)")],
    overrides: AnalysisOverrides = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML configuration of an analysis")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take and measure every real step as well")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results folder if it exists")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted")] = False,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal, and no table")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as one JSON object")] = False,
) -> None:
    """Price list: what each intervention would do to entropy and reward in the next step. Prints the report's path last."""
    from entropy_experiments.console.early_refusals import refuse_checkpoint_early
    from entropy_experiments.console.price import price_config, price_folder, price_outcome, prices_of, print_prices

    if resume and overwrite:
        raise UserError("--resume goes on with what is there, --overwrite throws it away: take one of them")
    settings = price_config(config, overrides or [], measure)
    refuse_checkpoint_early(checkpoint, settings, trust)
    with stdout_kept_for_results():
        quiet_libraries()
        from rich.console import Console

        from entropy_experiments.console.analyze import analyze_with_progress

        options = {"overwrite": overwrite, "resume": resume, "trust": trust, "quiet": quiet}
        folder = price_folder(checkpoint, settings)
        analysis = analyze_with_progress(checkpoint, settings, folder=folder, table=False, **options)
        result = prices_of(analysis.folder)
        if not (quiet or as_json):
            print_prices(Console(stderr=True, highlight=False), result)
    if as_json:
        _print_json({"command": "price", "report": str(analysis.report), **price_outcome(result)})
    else:
        print(analysis.report)


@app.command()
def sweep(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR... [KEY=VALUE]...", help="Run folders, then overrides")
    ],
    config: Annotated[Path | None, typer.Option("--config", help="YAML configuration of the sweep")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where to; by default output_dir/sweep_<date>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a sweep; what is done is kept")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the sweep if it exists, start anew")] = False,
    shard: Annotated[str | None, typer.Option("--shard", help="i/n: this process's part, e.g. 2/8")] = None,
    assemble: Annotated[bool, typer.Option("--assemble", help="Analyse nothing; put together what is done")] = False,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Write results even if a self-check fails")] = False,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal, and no table")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print verdict, numbers and paths as one JSON object")
    ] = False,
) -> None:
    """Analyse every checkpoint of one or several runs alike, and report how it evolved. Prints the report's path last."""
    from entropy_experiments.console.early_refusals import refuse_sweep_early
    from entropy_experiments.sweep.config import SweepConfig
    from rl_training.configuration import load_config

    overrides = [a for a in arguments if "=" in a and not Path(a).exists()]
    settings = load_config(SweepConfig, config, overrides)
    runs = [Path(a) for a in arguments if a not in overrides]
    refuse_sweep_early(runs, settings)
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.console.sweep import refuse_failures, sweep_outcome, sweep_with_progress

        options = {"folder": folder, "resume": resume, "overwrite": overwrite, "shard": shard, "assemble": assemble}
        done = sweep_with_progress(
            runs, settings, table=not as_json, quiet=quiet, keep_going=keep_going, trust=trust, **options
        )
    if as_json:
        _print_json({"command": "sweep", **sweep_outcome(done)})
    elif done.report is not None:
        print(done.report)
    refuse_failures(done)


@app.command()
def report(results: Annotated[Path, typer.Argument(help="Results folder of an analysis")]) -> None:
    """Write the figures and report.html of a results folder anew. Prints the report's path."""
    from entropy_experiments.report.page import write_report

    print(write_report(results))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="A B...", help="Results folders of analyses, or of sweeps")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the comparison")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison if it exists")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the page's path alone")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print verdict, numbers and paths as one JSON object")
    ] = False,
) -> None:
    """Compare analyses, or sweeps, with the first of them: differences and their standard errors. Prints the page's path last."""
    with stdout_kept_for_results():
        from entropy_experiments.compare.page import REPORT, write_comparison
        from entropy_experiments.records.record import json_of

        found = write_comparison(folders, output, overwrite)
    report = str(output / REPORT)
    if as_json:
        _print_json({"command": "compare", "folder": str(output), "report": report, **json_of(found)})
        return
    if not quiet:
        from entropy_experiments.console.progress import progress_console
        from entropy_experiments.console.tables import print_comparison

        print_comparison(progress_console(quiet), found)
    print(report)


@app.command()
def explore(
    results: Annotated[Path, typer.Argument(help="Results folder of an analysis")],
    port: Annotated[int | None, typer.Option("--port", help="Port of the page; by default a free one")] = None,
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser window; print the address")] = False,
) -> None:
    """Open a results folder in a notebook to look around in. Ctrl-C ends it."""
    from entropy_experiments.console.explore import open_notebook

    raise typer.Exit(open_notebook(results, port, headless))


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder, while it trains or after")],
    port: Annotated[int, typer.Option("--port", help="Port of the page; 0 takes a free one", min=0, max=65535)] = 0,
) -> None:
    """A page on this machine that grows with a run: entropy, and each step's predicted and measured change."""
    from entropy_experiments.console.early_refusals import refuse_absent_folder

    refuse_absent_folder(run)
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.console.watch import watch as serve
    serve(run, port, lambda address: print(f"open in a browser: {address}  (Ctrl-C ends it)", flush=True))


@app.command()
def doctor(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, run, or a folder of many of them")],
    trust: Trust = False,
) -> None:
    """Say what a checkpoint holds, what can be analysed, and what is missing and how to get it. A folder of many: a table."""
    from entropy_experiments.console.early_refusals import refuse_absent_folder

    refuse_absent_folder(checkpoint)
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.console.doctor import examine_all

        lines, healthy = examine_all(checkpoint, trust)
    print(visible("\n".join(line.replace("\n", " ") for line in lines)))  # a stranger's record may hold anything
    if not healthy:
        raise typer.Exit(1)


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="Checkpoint, or run, of another trainer")],
    output: Annotated[Path, typer.Option("--output", help="Run folder to make")],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or name with configuration and tokenizer, if SOURCE has none")
    ] = None,
    rollouts: Annotated[
        Path | None, typer.Option("--rollouts", help="Dump of sequences, of any trainer, to lie beside each checkpoint")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the run folder alone")] = False,
) -> None:
    """Make a run of this project out of checkpoints of TRL, DeepSpeed, torch DCP, verl or SkyRL. Prints its folder last."""
    from entropy_experiments.console.early_refusals import refuse_absent_folder

    refuse_absent_folder(source)
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.console.import_source import import_lines, import_run

        made = import_run(source, output, model, rollouts)
        if not quiet:
            print(visible("\n".join(import_lines(made))), file=sys.stderr)
    print(output)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="Run folder: its log, its checkpoints, its recorded sequences")],
    steps: Annotated[str | None, typer.Option("--steps", help="Logged steps, e.g. 1,4-6; all by default")] = None,
    device: Annotated[str, typer.Option("--device", help="Where to recompute: auto, cpu, cuda")] = "auto",
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number and verdict as one JSON object")] = False,
) -> None:
    """Recompute what a trainer logged of its steps (entropy, reward, lengths), and name the cause where the log differs."""
    from entropy_experiments.audit.step_choice import parse_steps

    wanted = None if steps is None else parse_steps(steps)
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.audit.audit import audit_run
        from entropy_experiments.audit.lines import audit_lines

        found = audit_run(run, device, wanted, trust)
    if as_json:
        _print_json({"command": "audit", **found.to_json()})
    else:
        print(visible("\n".join(audit_lines(found))))
    if not found.agrees:
        raise typer.Exit(1)


app.command()(ledger)


@app.command()
def schema(
    file: Annotated[str | None, typer.Argument(help="One of them: summary.json, sweep.json, ...; default: all")] = None,
) -> None:
    """Print the JSON schema of the files that analyze, sweep and compare write (docs/guides/results-format.md)."""
    from entropy_experiments.records.schema import schema, schemas

    _print_json(schemas() if file is None else schema(file))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", help="Folder for the demo's runs and results")] = Path("runs"),
) -> None:
    """Train a small model until its entropy falls, analyse the checkpoint, write the report: 6 to 7 minutes on two cores."""
    quiet_libraries()
    from entropy_experiments.console.demo import run_demo

    print(run_demo(output))


def _print_forecast(
    checkpoint: Path, settings: FisherAnalysisConfig, trust: bool, as_json: bool, devices: int | None, bandwidth: float
) -> None:
    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.forecast.cluster import plan_cluster
        from entropy_experiments.forecast.forecast import forecast_analysis

        forecast: Any = (
            forecast_analysis(checkpoint, settings, trust)
            if devices is None
            else plan_cluster(checkpoint, settings, devices, bandwidth)
        )
    if as_json:
        _print_json({"command": "analyze --dry-run", **forecast.to_json()})
    else:
        print(visible("\n".join(forecast.lines())))


def _print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout; text stays readable, and what the terminal cannot encode is escaped as JSON has it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without Unicode, or half characters in the text
        text = json.dumps(content, allow_nan=False)
    print(text)


def main() -> None:
    """Run the command line; whatever ends it is one line on stderr and an exit status."""
    run_to_the_end(app)


if __name__ == "__main__":
    main()
