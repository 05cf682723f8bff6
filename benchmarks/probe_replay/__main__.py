"""python -m benchmarks.probe_replay record RUN... | replay | page | pack RUN... | score [MODULE:FUNCTION...]

See the package's docstring.
"""

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
    elif command == "pack" and rest:
        from benchmarks.probe_replay.runs import find_run
        from benchmarks.probe_replay.score import RECORDS, pack
        from benchmarks.probe_replay.tape import load_tape

        for name in rest:
            pack(load_tape(name, find_run(name).folder), RECORDS / f"{name}.npz")
    elif command == "score":
        from benchmarks.probe_replay.score import main as score

        score(rest)
    else:
        raise SystemExit("usage: " + (__doc__ or "").splitlines()[0])


if __name__ == "__main__":
    main(sys.argv[1:])
