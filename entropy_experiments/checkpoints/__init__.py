"""Files of a checkpoint, opened with suspicion: adapters, optimizer state, learning rate, the policy's outline.

Imports config and rl_training; loads no model (checkpoint_loader does).
"""
