"""The parts of the entropy probe: the prediction of a step, its parts, errors, shares, and what is logged.

algs.entropy_probe puts them together. Imports entropy_core, rl_training.config and rl_training.prompts.
"""
