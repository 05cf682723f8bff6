"""The package as it is installed: a wheel, unpacked where there is no checkout, finds its templates and configurations."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.entropy_experiments.results_fixture import build_results

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("entropy_core", "rl_training", "entropy_experiments", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs, far from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command += ["--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def run(installed: Path, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_report_is_written_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    build_results(tmp_path / "results")
    code = (
        "import sys, entropy_experiments.report.page as page\n"
        "from entropy_experiments.cli import main\n"
        "print(page.__file__, file=sys.stderr)\n"
        "sys.argv = ['entropy-experiments', 'report', 'results']; main()"
    )
    done = run(installed, code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(installed) in done.stderr, "the checkout was run, not the wheel"
    assert "<html" in (tmp_path / "results" / "report.html").read_text(encoding="utf-8")


def test_configurations_and_notebook_are_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, entropy_experiments.console.demo as demo, entropy_experiments.console.explore as explore\n"
        "print(json.dumps([str(p) for p in (demo.TRAIN_CONFIG, demo.ANALYSIS_CONFIG, explore.NOTEBOOK)]))"
    )
    done = run(installed, code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in map(Path, json.loads(done.stdout)):
        assert path.is_file() and path.is_relative_to(installed), path


def test_nothing_else_is_in_the_wheel(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"entropy_core", "rl_training", "entropy_experiments"}


def test_the_source_distribution_holds_the_repository(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    command = [
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(tmp_path / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        packed = {name.partition("/")[2] for name in content.getnames()}
    assert not set(files) - packed


def test_the_wheel_holds_packages_and_nothing_else(installed: Path) -> None:
    found = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert found == {"entropy_core", "rl_training", "entropy_experiments"}
    odd = [path for path in installed.rglob("*") if path.suffix in {".pyc", ".safetensors", ".parquet", ".pt"}]
    assert not odd, odd


def test_every_file_of_the_packages_is_in_the_wheel(installed: Path) -> None:
    """Templates, styles, scripts, configurations, tables: what stands beside the code in the checkout."""
    for package in ("entropy_core", "rl_training", "entropy_experiments"):
        there = {file.relative_to(ROOT) for file in (ROOT / package).rglob("*") if file.is_file()}
        wanted = {file for file in there if "__pycache__" not in file.parts and file.parts[1] != "results"}
        assert wanted, package
        missing = {str(file) for file in wanted if not (installed / file).is_file()}
        assert not missing, missing


def test_the_wheel_says_what_it_is_and_needs(installed: Path) -> None:
    (information,) = installed.glob("*.dist-info")
    content = Parser().parsestr((information / "METADATA").read_text(encoding="utf-8"))
    assert content["Name"] == "entropy-experiments" and content["Version"] == project_version()
    assert {"all", "analysis", "train", "notebook"} <= set(content.get_all("Provides-Extra"))
    plain = [need for need in content.get_all("Requires-Dist") if "extra ==" not in need]
    assert len(plain) == 1 and plain[0].startswith("torch"), "the mathematics needs torch alone"
    assert "entropy-experiments = entropy_experiments.__main__:main" in (information / "entry_points.txt").read_text()
    assert "MIT" in content["License-Expression"] and list(information.rglob("LICENSE"))


def project_version() -> str:
    """The one place of the version: pyproject.toml."""
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    return version


def test_one_version_everywhere() -> None:
    version = project_version()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert not released or released[0] == version, "the changelog's newest release is another version"
