"""`-p tests.durations`, as in `make durations`: how long tests took, into tests/durations.md; by which files are ordered.

Seconds are of the clock, CPU seconds those of the test's process and of the processes that it started.
"""

from __future__ import annotations

import re
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = Path(__file__).with_name("durations.md")
HEAD = """# How long tests take

Made by `make durations`; the order in which files are tested follows from it (the longest first, so that the processes of
`make test` end together). CPU seconds are those of a test's own process and of the processes that it started.
"""
SECTIONS = {"not long": "make test", "long": "make test-long"}
MOST_TESTS = 40

_last = 0.0


def recorded_seconds() -> dict[str, float]:
    """File -> seconds, as recorded last; of both parts together."""
    found: dict[str, float] = defaultdict(float)
    if PAGE.exists():
        for file, seconds in re.findall(r"^\| (tests/\S+\.py) \| \d+ \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE):
            found[file] += float(seconds)
    return found


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    warm = sys.modules.get("tests.warm_python")
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime + (warm.cpu_seconds[0] if warm else 0.0)


def pytest_runtest_logstart() -> None:
    global _last
    _last = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    global _last
    report = yield
    now = _cpu_seconds()
    report.cpu_seconds, _last = now - _last, now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the section of the part that was run; the other stays."""
    name = SECTIONS.get(config.option.markexpr)
    if name is None or hasattr(config, "workerinput"):
        return
    tests: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tests[report.nodeid][0] += report.duration
                tests[report.nodeid][1] += getattr(report, "cpu_seconds", 0.0)
    sections = {title: text for title, text in _sections(PAGE.read_text() if PAGE.exists() else "")}
    sections[name] = _section(tests)
    PAGE.write_text(
        HEAD + "".join(f"\n## {title}\n{sections[title]}" for title in SECTIONS.values() if title in sections)
    )
    terminalreporter.write_line(f"wrote {PAGE}")


def _sections(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", page, re.MULTILINE)


def _section(tests: dict[str, list[float]]) -> str:
    files: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, (seconds, cpu) in tests.items():
        file = files[name.split("::")[0]]
        file[0], file[1], file[2] = file[0] + 1, file[1] + seconds, file[2] + cpu
    wall, cpu = (sum(row[k] for row in tests.values()) for k in (0, 1))
    lines = [
        "",
        f"{len(tests)} tests, {wall:.0f} seconds in all processes together, {cpu:.0f} CPU seconds.",
        "",
        "| file | tests | seconds | CPU seconds |",
        "|---|---|---|---|",
        *(
            f"| {name} | {int(n)} | {s:.1f} | {c:.1f} |"
            for name, (n, s, c) in sorted(files.items(), key=lambda x: -x[1][1])
        ),
        "",
        f"The {min(MOST_TESTS, len(tests))} longest tests:",
        "",
        "| test | seconds | CPU seconds |",
        "|---|---|---|",
    ]
    longest = sorted(tests.items(), key=lambda x: -x[1][0])[:MOST_TESTS]
    lines += [f"| {name.replace('|', ' ')} | {s:.1f} | {c:.1f} |" for name, (s, c) in longest]
    return "\n".join(lines) + "\n"
