"""The replay bench of the entropy probe: real runs recorded token by token, on which estimators and schedules are arithmetic.

    python -m benchmarks.probe_replay record small-0 ...   record runs (resumable; data under runs/probe_replay/, outside git)
    python -m benchmarks.probe_replay replay               every estimator and schedule on all recorded runs, in seconds
    python -m benchmarks.probe_replay page                 table and figure from the replay's results

See README.md beside this file.
"""
