"""Open the notebook on a results folder: a page in the browser, served by marimo from this machine alone."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from entropy_experiments.records.reader import read_results_folder
from rl_training.errors import UserError

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "fisher_visualization.py"


def notebook_command(
    results: Path, port: int | None = None, headless: bool = False, notebook: Path = NOTEBOOK
) -> list[str]:
    """The command that serves the notebook on `results`.

    Raises UserError where marimo is not installed, or `results` is not a results folder.
    """
    if importlib.util.find_spec("marimo") is None:
        raise UserError(
            'the notebook needs marimo, which is not installed: pip install "entropy-experiments[notebook]"'
        )
    read_results_folder(results)
    options = ["--headless"] if headless else []
    if port is not None:
        options += ["--port", str(port)]
    return [sys.executable, "-m", "marimo", "run", str(notebook), *options, "--", "--results", str(results.resolve())]


def open_notebook(results: Path, port: int | None = None, headless: bool = False) -> int:
    """Serve the notebook until it is interrupted; the exit code. Raises UserError as `notebook_command` does.

    marimo keeps what it has shown in a folder beside the notebook, texts of prompts and completions among it: a copy in a
    temporary folder is served, so that nothing of it stays.
    """
    with tempfile.TemporaryDirectory(prefix="fisher-notebook-") as folder:
        copy = Path(shutil.copy(NOTEBOOK, folder))
        process = subprocess.Popen(notebook_command(results, port, headless, copy))
        try:
            return process.wait()
        except KeyboardInterrupt:  # marimo got it too, and ends by itself
            process.wait()
            return 0
