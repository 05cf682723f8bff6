"""What README shows of a run is what the stored run says, and what it tells a user to type is there."""

import json
import re
from pathlib import Path

from docs import demo_examples, show_demo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_verdict_is_that_of_the_recorded_demo() -> None:
    record = json.loads(show_demo.RECORD.read_text(encoding="utf-8"))
    assert show_demo.shown_in(README) == show_demo.quoted(record["lead"]), "run docs/show_demo.py"
    assert set(record["lead"]) <= set(record["verdict"])


def test_the_figures_are_those_of_the_recorded_demo() -> None:
    record = json.loads(show_demo.RECORD.read_text(encoding="utf-8"))
    found = {name: show_demo.digest(show_demo.FIGURES / name) for name in record["figures"]}
    assert found == record["figures"], "a figure was changed by hand, or is of another run: run docs/show_demo.py"


def test_the_examples_of_the_pages_are_those_of_the_recorded_demo() -> None:
    record = json.loads(show_demo.RECORD.read_text(encoding="utf-8"))
    assert set(record["examples"]) == {*demo_examples.EXAMPLES, demo_examples.TABLE}
    found = {name: demo_examples.shown_on_page(name) for name in record["examples"]}
    assert found == record["examples"], "run docs/show_demo.py"


def test_no_figure_in_readme_is_of_another_run() -> None:
    record = json.loads(show_demo.RECORD.read_text(encoding="utf-8"))
    shown = {Path(target).name for target in re.findall(r"\]\((docs/figures/[^)]+)\)", README)}
    assert shown <= record["figures"].keys(), shown - record["figures"].keys()


def test_commands_in_readme_exist() -> None:
    targets = set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets), targets
    commands = set(re.findall(r"^entropy-experiments +([a-z]+)", README, flags=re.MULTILINE))
    command_line = (ROOT / "entropy_experiments" / "cli.py").read_text(encoding="utf-8")
    assert commands and all(f"def {name}(" in command_line for name in commands), commands
