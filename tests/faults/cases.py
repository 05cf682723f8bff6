"""One case of the fault harness: something is wrong, and what must come of it.

Allowed ends are few: one line that names what is wrong (a `UserError`), or, where a case says so, success. Everything else is a
failure of ours: another exception, a line with a line break in it, a wait without an end, a refusal that names the wrong thing.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_training.errors import UserError
from tests.time_limit import OverTime, limited

REFUSED = "refused"
EITHER = "either"
_SECONDS = 1500  # of waiting; nothing here takes one hundredth of it on a quiet machine


@dataclass(frozen=True)
class Case:
    """area, name: where it stands in the table. act: is given an empty folder. line: what the refusal must match.
    must: REFUSED, or EITHER (a value that may be legal): then success is allowed as well.
    """

    area: str
    name: str
    act: Callable[[Path], Any]
    line: str = ""
    must: str = REFUSED


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `trouble` is empty where it is as it must be."""

    case: Case
    trouble: str
    said: str
    seconds: float


def run_case(case: Case) -> Outcome:
    """Run it in this process."""
    started, said = time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
            try:
                with limited(_SECONDS):
                    case.act(Path(folder))
                trouble = "" if case.must == EITHER else "was taken without a word"
            except UserError as error:
                said = str(error)
                trouble = "" if re.search(case.line, said) else f"the line does not match {case.line!r}"
                trouble = trouble or ("more than one line" if "\n" in said.strip() else "")
            except OverTime:
                trouble = f"no end after {_SECONDS} s"
            except BaseException as error:  # noqa: B036 - whatever it is, it is a finding
                said = f"{type(error).__name__}: {error}"
                trouble = "is a traceback"
    return Outcome(case, trouble, said[:300], time.perf_counter() - started)
