"""Checks that a run makes of its own premises: how it samples, the trainer's gradient, the saved
policy.

Used by the trainer and by the probe's integration. Imports entropy_core, rl_training.generation and
rl_training.run.
"""
