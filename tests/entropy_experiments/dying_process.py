"""The command line in a process that kills itself: `python -m tests.entropy_experiments.dying_process BLOCK analyze ...`.

SIGKILL comes in the middle of writing the block (`evaluation/tile-00000-rows-00001`): half of its bytes are on the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from entropy_experiments.cli import main
from entropy_experiments.kernel import workspace as kernel_workspace


def main_until(block: str) -> None:
    write_whole = kernel_workspace.write_whole

    def write(path: Path, content: bytes) -> None:
        if f"{path.parent.name}/{path.stem}" == block:
            path.with_name(path.name + ".part").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(path, content)

    kernel_workspace.write_whole = write
    main()


if __name__ == "__main__":
    main_until(sys.argv.pop(1))
