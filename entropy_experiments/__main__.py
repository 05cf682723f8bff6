"""`entropy-experiments` and `python -m entropy_experiments`, which is also what `accelerate launch -m` runs."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from entropy_experiments.run.launcher_watch import end_with_the_launcher


def main() -> None:
    """Run the command line. A signal while it is still being imported ends in one line, as later."""
    end_with_the_launcher()
    _refuse_gone_folder()
    early = _caught_early() if os.environ.get("WORLD_SIZE", "1") == "1" else {}
    try:
        run = _command_line()
        for number, before in early.items():  # from here on it has handlers of its own
            signal.signal(number, before)
        run()
    except KeyboardInterrupt:  # in a launch: nothing was caught early
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _command_line() -> Callable[[], None]:
    """What runs the commands. The mathematics is installed without extras; the command line needs one, and says so."""
    try:
        from entropy_experiments.cli import main as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "entropy_core", "rl_training", "entropy_experiments"):
            raise
        print(
            f"error: the command line needs the package {package}, which an installation without extras does not have: install "
            "entropy-experiments[analysis] for checkpoints, entropy-experiments[train] for the demo and training as well",
            file=sys.stderr,
        )
        sys.exit(2)
    return run


def _refuse_gone_folder() -> None:
    """Libraries look for themselves from the working folder, and end the process in words of their own where it is gone."""
    try:
        os.getcwd()
    except OSError:
        print("error: the working folder is gone: change to one that exists", file=sys.stderr)
        sys.exit(2)


def _caught_early() -> dict[int, Any]:
    """The signals that end a process, where nobody ignores them (nohup), with the handlers before; nothing is open yet that would
    have to be closed.
    """

    def end(number: int, frame: object) -> None:
        line = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        os.write(2, f"{line}\n".encode())
        os._exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = {n: signal.getsignal(n) for n in numbers}
    taken = {n: before for n, before in taken.items() if before in (signal.SIG_DFL, signal.default_int_handler)}
    for number in taken:
        signal.signal(number, end)
    return taken


if __name__ == "__main__":
    main()
