"""`entropy-experiments` and `python -m entropy_experiments`, which is also what `accelerate launch -m` runs."""

import os
import signal
import sys

from entropy_experiments.run.launcher_watch import end_with_the_launcher


def main() -> None:
    """Run the command line. A signal while it is still being imported ends in one line, as later."""
    end_with_the_launcher()
    early = _caught_early() if os.environ.get("WORLD_SIZE", "1") == "1" else []
    try:
        from entropy_experiments.cli import main as run

        for number in early:  # from here on it has handlers of its own
            signal.signal(number, signal.SIG_DFL)
        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _caught_early() -> list[int]:
    """SIGTERM and SIGHUP, where nobody ignores them (nohup); nothing is open yet that would have to be closed."""

    def end(number: int, frame: object) -> None:
        os.write(2, f"ended by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [n for n in (getattr(signal, name) for name in names) if signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    return taken


if __name__ == "__main__":
    main()
