"""Libraries keep their progress bars and advice to themselves; nothing is imported here that takes time."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


def quiet_libraries() -> None:
    """Keep libraries' own progress bars and advice off the terminal; errors and warnings of ours still come through."""
    for library in ("transformers", "trl", "peft", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers asks it too
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL reports every trainer that is made
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def stdout_kept_for_results() -> Iterator[None]:
    """What libraries print goes to stderr, so that stdout holds nothing but a command's result."""
    with redirect_stdout(sys.stderr):
        yield
