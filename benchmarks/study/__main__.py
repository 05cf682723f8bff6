"""`python -m benchmarks.study tune | run | foretold | smollm2 | page`; see the package's docstring."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

from benchmarks.study import smollm2
from benchmarks.study.arms import ARMS
from benchmarks.study.foretold import prices_at
from benchmarks.study.page import write_page
from benchmarks.study.runs import SEEDS, STEPS, run
from benchmarks.study.tasks import TASKS
from benchmarks.study.tuning import tune, tuned


def main() -> None:
    """Seeds are the outer loop, so that what is stopped early has all arms of its seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study")
    parser.add_argument("what", choices=("tune", "run", "foretold", "smollm2", "page"))
    parser.add_argument("--task", choices=sorted(TASKS), default="sums")
    parser.add_argument("--arms", nargs="*", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core")
    given = parser.parse_args()
    if given.what == "tune":
        tune(given.task)
    elif given.what == "foretold":
        for seed in given.seeds:
            print(seed, prices_at(TASKS[given.task], seed), flush=True)
    elif given.what == "smollm2":
        smollm2.main()
    elif given.what == "page":
        write_page()
    else:
        wanted = [(given.task, arm, seed, given.steps) for seed in given.seeds for arm in given.arms]
        overrides = {"bonus": tuned(given.task)} if "bonus" in given.arms else {}
        with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(run, *one, **overrides.get(one[1], {})) for one in wanted]):
                print(done.result(), flush=True)


if __name__ == "__main__":
    main()
