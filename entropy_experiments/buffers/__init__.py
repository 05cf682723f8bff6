"""Where the sequences of an analysis come from: the recorded law and task, stored rollouts, files of one's own.

Imports checkpoint_loader, checkpoints and config.
"""
