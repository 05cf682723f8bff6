"""Where the sequences of an analysis come from: the recorded law and task, stored rollouts, files that the user gives.

Imports checkpoint_loader, checkpoints and config.
"""
