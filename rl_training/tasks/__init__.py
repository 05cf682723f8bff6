"""Tasks: prompts, answers, rewards and their limits, and what a task from a stranger may not do.

Imports rl_training.config and rl_training.files.
"""
