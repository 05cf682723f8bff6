"""The documentation site, from README, docs/ and the pages beside benchmarks and examples: `make docs`.

Pages keep their places relative to each other, so that one link serves a forge and the site alike. A link that
leads nowhere, or a page without a place in the navigation, fails the build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "site-pages"
SUFFIXES = {".md", ".png", ".css", ".svg"}


def published() -> list[Path]:
    """Every file of the site, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in listed.stdout.splitlines()]
    programs = [file for file in files if file.parts[0] in {"examples", "benchmarks"} and file.suffix == ".py"]
    return programs + [
        file
        for file in files
        if file.suffix in SUFFIXES and (file.parts[0] in {"docs", "benchmarks"} or len(file.parts) == 1)
    ]


def stage() -> None:
    """Copies what is published into build/site-pages, README as the first page."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for file in published():
        if not (ROOT / file).is_file():  # deleted, and not committed yet
            continue
        target = PAGES / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, target)


def main() -> int:
    """Stages and builds; the exit status of mkdocs, whose warnings are errors."""
    stage()
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "mkdocs.yml"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    # Without --quiet, which hides the warnings from --strict as well.
    print(
        "".join(line for line in built.stderr.splitlines(True) if not line.startswith("INFO")), end="", file=sys.stderr
    )
    return built.returncode


if __name__ == "__main__":
    raise SystemExit(main())
