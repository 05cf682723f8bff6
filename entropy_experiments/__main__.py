"""`entropy-experiments` and `python -m entropy_experiments`, which is also what `accelerate launch -m` runs."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is still being imported ends in one line, as later."""
    try:
        from entropy_experiments.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
