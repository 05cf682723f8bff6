"""One flipped bit in any file of a results folder is seen by whoever reads it, and no page or comparison is made of it."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from entropy_experiments.compare.page import write_comparison
from entropy_experiments.console.explore import open_notebook
from entropy_experiments.records.folder_files import DATA, not_of_an_analysis
from entropy_experiments.records.reader import read_results_folder
from entropy_experiments.report.outcome import read_outcome
from entropy_experiments.report.page import write_report
from rl_training.errors import UserError
from rl_training.run.sums import SUMS_NAME

READERS: dict[str, Callable[[Path], object]] = {
    "report": write_report,
    "compare": lambda folder: write_comparison([folder.parent / "whole", folder], folder.parent / "compared"),
    "explore": lambda folder: open_notebook(folder, None, True),
    "outcome": read_outcome,
    "notebook": read_results_folder,
}


@pytest.fixture
def damaged(small_analysis, tmp_path: Path) -> Path:
    for name in ("whole", "damaged"):
        shutil.copytree(small_analysis.folder, tmp_path / name)
    return tmp_path / "damaged"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def last_number(path: Path) -> int:
    """Where a bit can be flipped so that the file is read as before: a digit, a text, a value of the kernel."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return len(content) - 7
    if path.suffix == ".parquet":
        return content.index(b"PAR1") + 60
    return max(place for place, byte in enumerate(content) if chr(byte) in "23456789")


@pytest.mark.parametrize("name", DATA)
def test_every_file(damaged: Path, name: str) -> None:
    flip(damaged / name, last_number(damaged / name))
    with pytest.raises(UserError, match=name):
        read_results_folder(damaged)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["kernel.safetensors", "summary.json"])
def test_every_reader(damaged: Path, name: str, reader: str) -> None:
    page = (damaged / "report.html").read_bytes()
    flip(damaged / name, last_number(damaged / name))
    with pytest.raises(UserError, match=f"{name} is not the file that was written .*analyze"):
        READERS[reader](damaged)
    assert (damaged / "report.html").read_bytes() == page and not (damaged.parent / "compared").exists()


def test_a_folder_without_digests_says_so(damaged: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_results_folder(damaged)
    (damaged / SUMS_NAME).unlink()
    with pytest.warns(UserWarning, match=f"has no {SUMS_NAME}"):
        read_results_folder(damaged)


def test_what_is_not_ours(damaged: Path) -> None:
    assert not_of_an_analysis(damaged) == []
    (damaged / "notes.txt").write_text("mine")
    (damaged / "figures" / "draft.svg").write_text("mine")
    assert not_of_an_analysis(damaged) == ["figures/draft.svg", "notes.txt"]
