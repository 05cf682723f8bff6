"""Read changed files one after the other; what is neither read nor refused as it may be is a finding, made small, and kept.

Every finding lies under `found/<target>/`, and the test suite reads each of them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from tests.fuzz.targets import Target
from tests.time_limit import OverTime, limited

FOUND = Path(__file__).parent / "found"
_SECONDS = 120
"""That one file may take."""
_BATCH = 150
_ALL = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much)


class _Seeds(tuple[bytes, ...]):
    """Not to be shown at length."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


class Finding(AssertionError):
    """What must not come of a file; `mark` tells kinds apart."""

    def __init__(self, mark: str, said: str) -> None:
        super().__init__(f"{mark}: {said}")
        self.mark = mark


def read(target: Target, content: bytes) -> bool:
    """Whether the file was read (else it was refused). Raises Finding."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), open(os.devnull, "w") as null:
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(null), contextlib.redirect_stdout(null):
            try:
                with limited(_SECONDS):
                    target.read(content, Path(folder))
            except target.refusals as error:
                if "\n" in str(error).strip():
                    raise Finding("several lines", str(error)[:200]) from error
                return False
            except OverTime as error:
                raise Finding("no end", f"after {_SECONDS} s") from error
            except BaseException as error:  # noqa: B036 - whatever it is, it is a finding
                place = next(
                    (f for f in reversed(traceback.extract_tb(error.__traceback__)) if _is_ours(f.filename)), None
                )
                where = "" if place is None else f" in {Path(place.filename).name}:{place.name}"
                raise Finding(f"{type(error).__name__}{where}", str(error)[:200]) from error
    return True


def _is_ours(name: str) -> bool:
    return "site-packages" not in name and any(
        part in name for part in ("entropy_core/", "rl_training/", "entropy_experiments/")
    )


@dataclass
class Tally:
    """tried, taken: files, and those that were read in spite of their changes. findings: mark -> what was said."""

    tried: int = 0
    taken: int = 0
    findings: dict[str, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)


def campaign(target: Target, seconds: float, examples: int = 10**9, first_seed: int = 0, keep: bool = True) -> Tally:
    """Try for so many seconds of this process and of those it started and waited for (of the clock: four times as many), or so
    many files. keep: write findings to `FOUND`.
    """
    for content in target.seeds():
        read(target, content)  # a sound file is no finding, and the first one pays for imports
    tally, number, latest, ends = Tally(), first_seed, time.monotonic() + 4 * seconds, _used() + seconds

    def over() -> bool:
        return _used() > ends or time.monotonic() > latest

    while not over() and tally.tried < examples:
        worst: dict[str, bytes] = {}

        @seed(number)
        @settings(
            max_examples=min(_BATCH, examples), deadline=None, database=None, suppress_health_check=_ALL,
            phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False, print_blob=False,
        )  # fmt: skip
        @given(target.mutants(_Seeds(target.seeds())))
        def one(content: bytes) -> None:
            if over():
                return
            tally.tried += 1
            try:
                tally.taken += read(target, content)
            except Finding as found:
                if found.mark in tally.findings:
                    return  # known: look for others
                worst[found.mark] = content  # noqa: B023 - called before the next is made
                tally.said[found.mark] = str(found)
                raise

        try:
            one()
        except (Finding, Flaky):  # flaky: the time was over before it was seen again
            for mark, content in worst.items():
                tally.findings[mark] = tally.said[mark]
                if keep:
                    _keep(target, content)
        number += 1
    return tally


def _used() -> float:
    """Seconds of processors."""
    return sum(os.times()[:4])


def _keep(target: Target, content: bytes) -> None:
    folder = FOUND / target.name.replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)


def kept(target: Target) -> list[bytes]:
    """What earlier campaigns found."""
    folder = FOUND / target.name.replace(" ", "_").replace(",", "")
    return [path.read_bytes() for path in sorted(folder.glob("*"))]
