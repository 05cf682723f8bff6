"""python -m benchmarks.probe_replay record RUN... | replay | page. See the package's docstring."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> None:
    command, *rest = arguments or ["help"]
    if command == "record" and rest:
        from benchmarks.probe_replay.runs import record

        for name in rest:
            record(name)
    elif command == "replay" and not rest:
        from benchmarks.probe_replay.replay import replay_all

        replay_all()
    elif command == "page" and not rest:
        from benchmarks.probe_replay.page import write_page

        write_page()
    else:
        raise SystemExit("usage: python -m benchmarks.probe_replay record RUN... | replay | page")


if __name__ == "__main__":
    main(sys.argv[1:])
