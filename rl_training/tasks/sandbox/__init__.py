"""Scorers that read what a policy wrote run here, in a locked-down child process without files,
network or environment.

Imports rl_training.errors and the problems of rl_training.tasks.task alone.
"""
