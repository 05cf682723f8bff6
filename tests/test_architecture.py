"""The house's own rules: floors, optional dependencies, file sizes, the price of `--help`, pins."""

import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("entropy_core", "rl_training", "entropy_experiments")
MAX_LINES = 400
HELP_SECONDS = 0.5

TRL_MODULES = {"rl_training.algs.dr_grpo", "rl_training.integrations.trl", "rl_training.train"}
"""The only modules that may need TRL; import-linter's contract in pyproject.toml names the same three."""

CONFIG_MODULES = (
    "rl_training.config",
    "rl_training.configuration",
    "entropy_experiments.config",
    "entropy_experiments.sweep.config",
)

SKIPPED_FOLDERS = {"__pycache__", "runs", "results", "build", "dist", "node_modules"}
TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".txt",
    ".cfg",
    ".ini",
    ".html",
    ".j2",
    ".jinja",
    ".sh",
    "",
}


def project_files() -> Iterator[Path]:
    """Files that belong to the project: none of virtual environments, caches, version control and results."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED_FOLDERS
            and (not name.startswith(".") or name in {".ci", ".github"})
            and not name.endswith((".egg-info", ".part"))
        ]
        yield from (Path(folder) / name for name in names)


def module_names() -> list[str]:
    """Dotted names of every module of the three packages, notebooks left out: they run when imported."""
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__main__" or SKIPPED_FOLDERS & set(parts) or "notebooks" in parts:
                continue
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run_python(code: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in which importing any of `blocked` raises ImportError."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def anchors(page: Path) -> set[str]:
    """The names by which a Markdown page's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_floors() -> None:
    """import-linter's contracts: imports go down only, and each floor needs no more than it may."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_drawn_import_graph_is_of_these_imports() -> None:
    command = [sys.executable, "docs/draw_architecture.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout


def test_core_needs_torch_alone() -> None:
    """Every module of entropy_core imports where torch is all there is."""
    blocked = (
        *(
            "transformers",
            "peft",
            "trl",
            "datasets",
            "accelerate",
            "pydantic",
            "yaml",
            "scipy",
            "sklearn",
            "pyarrow",
        ),
        *("pandas", "safetensors", "typer", "rich", "matplotlib", "plotly", "jaxtyping", "beartype"),
    )
    modules = [name for name in module_names() if name.split(".")[0] == "entropy_core"]
    assert "entropy_core" in modules, "entropy_core has no __init__.py"
    done = run_python("\n".join(f"import {name}" for name in modules), blocked)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.long  # a module of ours that imports TRL is seen by the import contracts too
def test_analysis_imports_without_trl() -> None:
    """Everything but the trainer, its integration and train.py imports where TRL is not installed."""
    modules = [name for name in module_names() if name not in TRL_MODULES]
    done = run_python("\n".join(f"import {name}" for name in modules), ("trl", "datasets"))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("module", CONFIG_MODULES)
def test_config_imports_no_torch(module: str) -> None:
    """A configuration is read without waiting for a tensor library (parent packages count too)."""
    assert find_spec(module) is not None
    done = run_python(
        f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'trl'}} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]", f"{module} or a package above it imports {done.stdout.strip()}"


def test_help_is_quick() -> None:
    """`entropy-experiments --help` takes under half a second: best of three, in CPU time (others may be busy)."""
    code = "import sys; from entropy_experiments.cli import main\nsys.argv = ['entropy-experiments', '--help']; main()"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "analyze" in done.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < HELP_SECONDS, f"{seconds}: does a module of the command line import torch at its top?"


REFUSED = {
    "no such checkpoint": ["analyze", "/no/such/folder"],
    "no such run": ["sweep", "/no/such/folder"],
    "nothing to examine": ["doctor", "/no/such/folder"],
    "no such results": ["report", "/no/such/folder"],
    "no such configuration": ["train", "/no/such/file.yaml"],
    "an unknown setting": ["analyze", ".", "entropy_analysis.unheard_of=1"],
    "not a checkpoint": ["analyze", "."],
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_are_quick(arguments: list[str], tmp_path: Path) -> None:
    """What is wrong with a path or a setting is said before torch is imported."""
    code = (
        "import sys; from entropy_experiments.cli import main\n"
        f"sys.argv = ['entropy-experiments', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "2 []", done.stdout + done.stderr[-2000:]
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


def test_constraints_pin_every_direct_dependency() -> None:
    """constraints.txt has one exact pin of each, without local suffix, in the range of pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins: dict[str, str] = {}
    for line in filter(None, lines):
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
        assert match, f"not an exact pin: {line}"
        name = canonicalize_name(match[1])
        assert name not in pins, f"{name} is pinned twice"
        assert "+" not in match[2], f"{line}: a local suffix ties the pin to one build"
        pins[name] = match[2]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == canonicalize_name(project["name"]):
            assert requirement.extras <= set(extras), f"{line} names an extra that is not there"
            continue
        assert name in pins, f"{name} has no pin"
        assert requirement.specifier.contains(pins[name]), f"{line}, but the pin is {pins[name]}"


def test_files_are_short() -> None:
    """At 400 lines a file has two ideas."""
    lengths = {path: len(path.read_text().splitlines()) for path in project_files() if path.suffix == ".py"}
    long = {str(path.relative_to(ROOT)): count for path, count in lengths.items() if count > MAX_LINES}
    assert not long, long


def test_no_drawer_of_odds_and_ends() -> None:
    """A file is named for what is in it."""
    names = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    found = [str(path.relative_to(ROOT)) for path in project_files() if path.name in names]
    assert not found, found


def test_nothing_points_outside_the_tree() -> None:
    """A reader has this tree and nothing beside it."""
    outside = ".." + "/shared"
    found = [
        str(path.relative_to(ROOT))
        for path in project_files()
        if path.suffix in TEXT_SUFFIXES and outside in path.read_text(errors="replace")
    ]
    assert not found, found


def test_pages_named_in_code_exist() -> None:
    """A docstring that points at a page of docs/ points at one that is there."""
    missing = [
        f"{path.relative_to(ROOT)} -> {page}"
        for path in project_files()
        if path.suffix in {".py", ".yaml", ".toml"}
        for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())
        if not (ROOT / page).exists()
    ]
    assert not missing, missing


def test_links_in_the_documentation_lead_somewhere() -> None:
    """Relative links of Markdown files name files, and headings, that exist."""
    broken = []
    for path in project_files():
        if path.suffix != ".md":
            continue
        prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose):
            page = path.parent / target if target else path
            if re.match(r"[a-z]+:", target) or (page.exists() and (not anchor or anchor in anchors(page))):
                continue
            broken.append(f"{path.relative_to(ROOT)} -> {target}#{anchor}")
    assert not broken, broken
