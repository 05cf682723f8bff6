"""What a person or a program sees of an analysis: the closing table, progress, --json, --quiet, with and without a terminal."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console

from entropy_experiments.compare.page import write_comparison
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console import progress as stage_progress
from entropy_experiments.console.analyze import expected_shares
from entropy_experiments.console.progress import StageProgress, duration
from entropy_experiments.console.tables import outcome_facts, print_comparison, print_outcomes, print_verdict
from entropy_experiments.records.estimates import NO_ESTIMATE
from entropy_experiments.records.folder_files import written_data
from entropy_experiments.records.outcome_record import ChecksOutcome, NoOutcome, SamePrompt, TriedCheckpoint
from entropy_experiments.records.record import json_of
from entropy_experiments.report.outcome import read_outcome
from entropy_experiments.run.reporter import Reporter
from rl_training.configuration import load_config
from rl_training.run.sums import write_sums
from tests.entropy_experiments.comparison_fixture import build_side
from tests.entropy_experiments.results_fixture import build_results
from tests.entropy_experiments.small_analysis import OFF, config
from tests.warm_python import UNPAINTED, warm_run

SMALL = [
    "entropy_analysis.eval_batch_size=8",
    "entropy_analysis.train_batch_size=8",
    "entropy_analysis.analysis.step_scales=[1.0]",
    "entropy_analysis.analysis.fresh_scales=[]",
    "checkpoint.device=cpu",
    *(f"entropy_analysis.analysis.{name}=false" for name in OFF),
]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def console(width=100, terminal=True, **options):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, **options)


def text_of(shown: Console) -> str:
    return ESCAPES.sub("", shown.file.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_results(tmp_path_factory.mktemp("console") / "results", analyses=True)


@pytest.fixture(scope="module")
def outcome(folder):
    return read_outcome(folder)


def test_the_outcome_is_json_and_holds_the_numbers(outcome, folder):
    again = json.loads(json.dumps(json_of(outcome), allow_nan=False))
    assert again["folder"] == str(folder) and again["report"] == str(folder / "report.html")
    ends = {"low": pytest.approx(-0.1107, abs=1e-4), "high": pytest.approx(-0.0373, abs=1e-4), "degrees_of_freedom": 31}
    assert (
        again["predicted"] == {"value": -0.074, "standard_error": 0.018, **ends}
        and again["estimator"] == "rao_blackwell"
    )
    assert again["measured"]["value"] == -0.08 and again["measured"]["effective_sample_size"] == 27.5
    assert sum(part["value"] for part in again["parts"].values()) == pytest.approx(-0.074)
    assert again["agreement"]["agrees"] and again["agreement"]["difference"] == pytest.approx(0.006)
    assert again["checks"] == {"passed": 7, "failed": []} and again["failed_analyses"] == {}
    assert again["same_prompt"]["cosine"] is not None
    assert any("predicted to change entropy" in sentence["text"] for sentence in again["verdict"])


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_table_fits_the_terminal_and_loses_nothing(outcome, width):
    shown = console(width)
    print_verdict(shown, outcome)
    lines = text_of(shown).splitlines()
    assert max(map(len, lines)) <= width
    squeezed = re.sub(r"\s+", "", "".join(lines))
    for words in ("−0.074[−0.111,−0.037]", "−0.080[−0.125,−0.035]", "7of7passed", "momentum"):
        assert words in squeezed
    if width >= 80:
        assert len(lines) < 20, "the closing table is not short"


def test_plain_lines_where_there_is_no_terminal(outcome):
    shown = console(40, terminal=False)
    print_verdict(shown, outcome)
    raw = shown.file.getvalue()
    assert "\x1b" not in raw and "│" not in raw and "─" not in raw
    assert "Predicted change: −0.074 [−0.111, −0.037] nats per token" in raw.splitlines(), (
        "plain lines are not to be wrapped"
    )
    assert f"Folder: {outcome.folder}" in raw.splitlines()


def test_no_color_is_obeyed(outcome, monkeypatch):
    print_verdict(coloured := console(), outcome)
    assert "\x1b[32m" in coloured.file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    print_verdict(uncoloured := console(), outcome)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", uncoloured.file.getvalue())


def test_what_failed_is_named_and_hostile_names_are_text(outcome):
    broken = outcome.model_copy(
        update={
            "checks": ChecksOutcome(passed=6, failed=["[red]rows[/red]\x1b[2J"]),
            "failed_analyses": {"buffers": "ValueError: [bold]"},
            "folder": "/tmp/[link=x]\x07",
            "agreement": outcome.agreement.model_copy(update={"agrees": False, "low": 0.001, "high": 0.011}),
        }
    )
    for terminal in (True, False):
        print_verdict(shown := console(120, terminal), broken)
        text = text_of(shown)
        assert "6 of 7 passed; FAILED: [red]rows[/red]" in text and "[bold]" in text and "[link=x]" in text
        assert "do NOT agree" in text and "\x07" not in shown.file.getvalue() and "\x1b[2J" not in shown.file.getvalue()


def test_numbers_that_are_not_there_leave_their_lines_out(outcome):
    unmeasured = outcome.measured.model_copy(update={"value": None, "standard_error": None})
    unlike = SamePrompt(cosine=None, cosine_other_prompts=None, p_value=None, signs_agree=None)
    missing = {"predicted": NO_ESTIMATE, "measured": unmeasured, "agreement": None, "same_prompt": unlike}
    empty = outcome.model_copy(update={**missing, "checks": ChecksOutcome(passed=0, failed=())})
    assert [name for name, *_ in outcome_facts(empty)] == ["Entropy before the step", "Self-checks", "Folder"]


@pytest.mark.parametrize("width", [30, 60, 90, 160])
def test_a_row_a_checkpoint(outcome, width):
    failed = NoOutcome(checkpoint=TriedCheckpoint(path="x", step=20), error="no optimizer.pt")
    print_outcomes(shown := console(width), [outcome, failed])
    text = text_of(shown)
    assert "step" in text and "no optimizer.pt" in text.replace("\n", " ") and "7 passed" in text
    if width >= 60:
        assert max(map(len, text.splitlines())) <= width
        assert ("momentum" in text) == (width > 100)
        assert ("apart: predicted less measured" in " ".join(text.split())) == (" SE " in text), "a column of that name"
    print_outcomes(plain := console(width, terminal=False), [outcome, failed])
    lines = plain.file.getvalue().splitlines()
    assert any(line.startswith("step 8: entropy 0.842 ± 0.071; predicted −0.074 ± 0.018") for line in lines)
    assert "step 20: failed: no optimizer.pt" in lines


@pytest.mark.parametrize("terminal", [True, False])
def test_a_comparison_on_the_console(tmp_path, terminal):
    found = write_comparison([build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, 0.05)], tmp_path / "out")
    print_comparison(shown := console(100, terminal), found)
    text = text_of(shown)
    assert "B loses" in text and "different from 0" in re.sub(r"\s+", " ", text)
    assert (tmp_path / "a").name in text


@pytest.mark.parametrize("terminal", [True, False])
def test_unpaired_is_explained_once(tmp_path, terminal):
    """It ended eight lines, and no line said why."""
    sides = build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, 0.05, prompts="other")
    print_comparison(shown := console(100, terminal), write_comparison(sides, tmp_path / "out"))
    text = text_of(shown)
    table = re.sub(r"\s+", " ", text[text.index("Unpaired, B minus A") :])
    assert "(unpaired)" not in text and text.count("Unpaired, B minus A") == 1
    assert "Unpaired, B minus A (all): other evaluation prompts (0 of 32 shared); errors of both sides" in table


class Time:
    """A clock that tests move."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(stage_progress.time, "monotonic", lambda: self.now)


def test_time_left_follows_the_shares(monkeypatch):
    clock = Time(monkeypatch)
    with StageProgress(console(terminal=False), {"a": 1.0, "b": 3.0, "c": 4.0}) as progress:
        progress.stage("a")
        assert progress.seconds_left() is None and progress.rate() is None
        clock.now += 10
        progress.stage("b")
        assert progress.seconds_left() == pytest.approx(70), "one part of eight took 10 s: seven are left"
        assert progress.rate() == pytest.approx(75.0), "an eighth in 10 s: 75% a minute"
        clock.now += 20
        assert progress.seconds_left() == pytest.approx(50)
        clock.now += 200
        assert progress.seconds_left() == pytest.approx(40), "a stage that takes longer than thought leaves the others"
        progress.stage("c")
        assert progress.seconds_left() == pytest.approx(230)


def test_no_time_left_is_told_from_less_than_a_fiftieth(monkeypatch):
    clock = Time(monkeypatch)
    with StageProgress(console(terminal=False), {"loading": 1.0, "drawing": 2.0, "kernels": 97.0}) as progress:
        clock.now += 60
        progress.stage("drawing")
        assert progress.seconds_left() is None, "a slow disk is no forecast: 60 s of loading would foretell 99 minutes"
        clock.now += 2
        progress.stage("kernels")
        assert progress.seconds_left() == pytest.approx(62 / 3 * 97)


def test_plain_progress_names_each_stage_once(monkeypatch):
    clock = Time(monkeypatch)
    with StageProgress(shown := console(terminal=False), {"loading": 1.0, "analysis: buffers": 1.0}) as progress:
        progress.stage("loading")
        clock.now += 5
        progress.stage("analysis: buffers")
    lines = shown.file.getvalue().splitlines()
    assert lines == [
        "analysis: loading (stage 1 of 2)",
        "analysis: buffers (stage 2 of 2; 0:05 so far, about 0:05 left)",
    ]


def test_progress_over_several_runs(monkeypatch):
    clock = Time(monkeypatch)
    with StageProgress(console(terminal=False), {"a": 1.0, "b": 1.0}, runs=2) as progress:
        progress.checkpoint("step 4", 1, 2)
        progress.stage("a")
        clock.now += 10
        progress.stage("b")
        clock.now += 10
        progress.checkpoint("step 8", 2, 2)
        progress.stage("a")
        assert progress.seconds_left() == pytest.approx(20)


@pytest.mark.parametrize("width", [30, 70, 120])
def test_the_bar_fits_and_shows_rate_and_time_left(width):
    with StageProgress(shown := console(width), {"a [bold]stage[/bold]": 1.0, "b": 1.0}) as progress:
        progress.stage("a [bold]stage[/bold]")
        time.sleep(0.01)
        progress.stage("b")
        progress._bar.refresh()
    text = text_of(shown)
    assert "left" in text and "50%" in text and ("%/min" in text) == (width >= 90)


def test_quiet_and_dumb_terminals_get_no_bar(monkeypatch):
    with StageProgress(quiet := console(quiet=True), {"a": 1.0}) as progress:
        progress.stage("a")
    assert quiet.file.getvalue() == ""
    monkeypatch.setenv("TERM", "dumb")
    with StageProgress(dumb := console(), {"a": 1.0}) as progress:
        progress.stage("a")
    assert dumb.file.getvalue() == "analysis: a (stage 1 of 1)\n"


def test_durations():
    assert [duration(s) for s in (0, 42.4, 725, 11220)] == ["0:00", "0:42", "12:05", "3:07:00"]


@pytest.mark.long
@pytest.mark.parametrize("matrix", [True, False])
def test_the_shares_name_the_stages_that_run(tiny_run, tmp_path, matrix):
    """Every stage that an analysis announces is expected, in that order, and nothing else is."""
    from entropy_experiments.entropy_runner import run_fisher_analysis

    class Announced(Reporter):
        def stage(self, name: str) -> None:
            stages.append(name)

    stages: list[str] = []
    settings = config(f"entropy_analysis.fisher_kernel.compute_full={'true' if matrix else 'false'}")
    run_fisher_analysis(tiny_run, settings, folder=tmp_path / "out", reporter=Announced())
    assert stages == list(expected_shares(settings))
    assert "the training buffer's own kernel" in expected_shares(FisherAnalysisConfig())
    name = "analysis: weighting schemes"
    without = load_config(FisherAnalysisConfig, None, ["entropy_analysis.fisher_kernel.compute_full=false"])
    assert expected_shares(without)[name] > 100 + expected_shares(FisherAnalysisConfig())[name], (
        "a pass for each weighting"
    )


def run(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "COLUMNS": "90", **environment}
    return warm_run("-m", "entropy_experiments", *arguments, env=env, prelude=UNPAINTED)


@pytest.mark.long
def test_json_is_one_object_on_stdout_and_progress_stays_on_stderr(tiny_run, tmp_path):
    found = run("analyze", tiny_run, "--trust", "--json", *SMALL, f"output_dir={tmp_path}/out")
    assert found.returncode == 0, found.stderr
    content = json.loads(found.stdout)
    assert content["command"] == "analyze" and os.path.isfile(content["report"])
    assert content["measured"]["value"] is not None and content["checks"]["passed"] >= 8
    assert "analysis: writing the results" in found.stderr and "Predicted change" not in found.stderr
    assert "analysis: analysis:" not in found.stderr
    quiet = run("analyze", tiny_run, "--trust", "--json", "--quiet", *SMALL, f"output_dir={tmp_path}/out2")
    assert json.loads(quiet.stdout)["predicted"] == content["predicted"] and quiet.stderr == ""
    refused = run("analyze", tiny_run, "--trust", "--json", *SMALL, f"output_dir={tmp_path}/out")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.splitlines()[-1].startswith("error: ")


def test_json_of_a_comparison(tmp_path):
    sides = build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, 0.05)
    for side in sides:
        write_sums(side, written_data(side))
    found = run("compare", *sides, "--output", tmp_path / "out", "--json")
    assert json.loads(found.stdout)["report"] == str(tmp_path / "out" / "comparison.html"), found.stderr
    assert found.stderr == ""
    again = run("compare", *sides, "--output", tmp_path / "out")
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    replaced = run("compare", *sides, "--output", tmp_path / "out", "--overwrite", "--quiet")
    assert replaced.stdout.strip() == str(tmp_path / "out" / "comparison.html") and replaced.stderr == ""


@pytest.mark.long
def test_on_a_real_terminal(tiny_run, tmp_path):
    """stderr on a pseudo-terminal of 70 columns: a bar, then the table; stdout, a pipe, holds the path alone."""
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "COLUMNS": "70", "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    command = [
        sys.executable,
        "-m",
        "entropy_experiments",
        "analyze",
        "--trust",
        str(tiny_run),
        *SMALL,
        f"output_dir={tmp_path}",
    ]
    # A real interpreter: here it is seen that libraries write nothing to the terminal.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=env)
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    stdout = process.communicate(timeout=60)[0].decode()
    text = ESCAPES.sub("", seen.decode(errors="replace"))
    assert process.returncode == 0, text
    assert stdout.strip().endswith("report.html") and len(stdout.splitlines()) == 1
    assert "Loading weights" not in text, "a library's own progress"
    assert "left" in text and "%" in text and "Predicted change" in text and "Verdict on checkpoint 4" in text
    table = text[text.index("Verdict on checkpoint") :].splitlines()
    assert max(len(line.rstrip()) for line in table) <= 70


def test_a_results_folder_of_a_newer_version_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "newer")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_outcome(copy)
