"""`make mutations`: plants each fault in a copy, runs what a user runs and the tests whose business it is, and prints who saw it.

    python -m tests.mutations [--part i/n] [--rows FILE] [--page FILE...]

--part: every n-th fault. --rows: where to keep what was found, a line a fault; what stands there is left out. --page: write
docs/mutations.md out of such files. Libraries are imported once; every fault has processes of its own, forked from there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.mutations.planted import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mutations.md"
_PACKAGES = ("entropy_core", "rl_training", "entropy_experiments", "tests")
_TRAINED_BY = ("rl_training/algs/",)
_SECONDS = 240


def copied(fault: Fault | None, folder: Path) -> Path:
    """The sources with the fault. Raises ValueError where what it changes does not stand there once."""
    for name in _PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if fault is not None:
        path = folder / fault.file
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise ValueError(f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}")
        path.write_text(text.replace(fault.old, fault.new))
    return folder


def forked(copy: Path, act: Callable[[], None], output: Path) -> str:
    """What `act` prints in a process that imports the packages from `copy`."""
    process = os.fork()
    if process == 0:
        code = 1
        with contextlib.suppress(BaseException), open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            signal_alarm(_SECONDS)
            os.chdir(copy)
            for name in [n for n in sys.modules if n.split(".")[0] in _PACKAGES]:
                del sys.modules[name]
            sys.path[:] = [str(copy), *(p for p in sys.path if p not in ("", str(ROOT)))]
            act()
            sys.stdout.flush()
            code = 0
        os._exit(code)
    os.waitpid(process, 0)
    return output.read_text(errors="replace")


def signal_alarm(seconds: int) -> None:
    """End this process after so many seconds."""
    import signal

    signal.alarm(seconds)


def seen_by_user(copy: Path, scratch: Path, run: Path | None) -> str:
    """Who spoke up in a user's run; "" for nobody."""

    def act() -> None:
        from tests.mutations import user_run

        sys.argv = ["user_run", str(scratch), *([] if run is None else [str(run)])]
        user_run.main()

    said = forked(copy, act, scratch / "said")
    line = next((line for line in said.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        return "no end" if not said.strip() else f"a crash: {said.strip().splitlines()[-1][:100]}"
    found = json.loads(line.removeprefix("FOUND "))
    return "; ".join(
        [*(f"check: {name}" for name in found["checks"]), *(f"refused: {text[:110]}" for text in found["refused"])]
    )


def seen_by_tests(fault: Fault, copy: Path, scratch: Path) -> str:
    """The first failing test; "" for none."""

    def act() -> None:
        import pytest

        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not long",
            "--no-header",
            "--tb=no",
            f"--basetemp={scratch / 'tests'}",
        ]
        pytest.main([*options, *fault.tests])

    said = forked(copy, act, scratch / "tested")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not failed and " passed" not in said:
        return "not known: no end"
    return failed[0].split(" ")[1].removeprefix("tests/").split(" - ")[0] if failed else ""


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.mutations")
    options.add_argument("--part", default="1/1")
    options.add_argument("--rows", type=Path)
    options.add_argument("--page", type=Path, nargs="*")
    asked = options.parse_args()
    if asked.page:
        rows = [json.loads(line) for path in asked.page for line in path.read_text().splitlines()]
        found = {row["name"]: (row["user"], row["test"]) for row in rows}
        PAGE.write_text(page([(fault, *found[fault.name]) for fault in FAULTS if fault.name in found]))
        return 0
    part, parts = map(int, asked.part.split("/"))
    for name in ("torch", "transformers.models.llama.modeling_llama", "transformers.generation", "peft", "trl", "pandas",
                 "pyarrow.parquet", "scipy.stats", "matplotlib.figure", "reasoning_gym", "pytest", "datasets"):  # fmt: skip
        __import__(name)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "sound").mkdir()
        sound, made = copied(None, root / "sound-copy"), root / "sound"
        nobody = seen_by_user(sound, made, None)
        if nobody:
            print(f"the sound sources are refused: {nobody}")
            return 1
        known = (
            set() if not (asked.rows and asked.rows.exists()) else {json.loads(r)["name"] for r in asked.rows.open()}
        )
        for number, fault in list(enumerate(FAULTS, start=1))[part - 1 :: parts]:
            if fault.name in known:
                continue
            scratch = root / f"{number}"
            scratch.mkdir()
            copy = copied(fault, root / f"{number}-copy")
            own = fault.file.startswith(_TRAINED_BY)
            user = seen_by_user(copy, scratch, None if own else made / "run")
            test = seen_by_tests(fault, copy, scratch)
            rows.append((fault, user, test))
            print(f"{number:2} {fault.name} | {user or '-'} | {test or '-'}", flush=True)
            if asked.rows:
                with asked.rows.open("a") as file:
                    file.write(json.dumps({"name": fault.name, "user": user, "test": test}) + "\n")
            shutil.rmtree(copy)
            shutil.rmtree(scratch)
    return int(any(not test or not (user or fault.unseen) for fault, user, test in rows))


def page(rows: list[tuple[Fault, str, str]]) -> str:
    """The table, in Markdown."""
    version = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout
    user, tests = sum(bool(u) for _, u, _ in rows), sum(bool(t) for *_, t in rows)
    lines = [
        "# Planted faults, and who sees them", "",
        "<!-- written by `make mutations` -->", "",
        f"{datetime.date.today().isoformat()}, version {version.strip()}: {len(rows)} of {len(FAULTS)} faults, each in a "
        f"copy of the sources. A user's run (training, then `analyze`) saw {user}, the test suite {tests}.", "",
        "| fault | in a user's run | first test that fails |", "| --- | --- | --- |",
    ]  # fmt: skip
    for fault, by_user, by_test in rows:
        by_user = re.sub(r"/\S*/sound/run", "RUN", by_user)
        cell = by_user.replace("|", "\\|") or (f"not seen: {fault.unseen}" if fault.unseen else "**not seen**")
        lines.append(f"| {fault.name} | {cell} | {by_test.replace('|', chr(92) + '|') or '**none**'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
