"""A run's folder: checkpoints' sidecar files, stored rollouts, digests, locks, resuming, and the console.

Imports rl_training.config and rl_training.files.
"""
