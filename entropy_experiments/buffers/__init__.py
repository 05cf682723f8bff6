"""Where the sequences of an analysis come from: drawn as the run recorded, its stored rollouts,
files that the user gives.

Imports checkpoint_loader, checkpoints and config.
"""
