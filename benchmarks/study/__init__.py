"""The reference study: which intervention holds entropy, and what it costs in reward, on a small policy in real TRL trainers.

    python -m benchmarks.study run                 every arm and seed; resumable run by run
    python -m benchmarks.study tune                the constant bonus's coefficient and its rivals' settings, on a seed of its own
    python -m benchmarks.study smollm2             the controller on SmolLM2-135M, 30 steps (half an hour)
    python -m benchmarks.study page                table, tests and figure from the stored rows

`make study` does all three. See README.md beside this file.
"""
