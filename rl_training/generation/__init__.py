"""How completions come about: generator settings, training-mode noise, the recorded description,
and rollouts as sequences.

Imports rl_training.sampling, prompts and probe; never a trainer.
"""
