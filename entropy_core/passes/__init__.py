"""How passes are made fast: forward passes, logits, frozen heads, shared tokens and prefixes, hooks, and the check of rows.

What is computed (scores, entropies, gradients, kernels) lives one level up. Imports entropy_core.batch and torch alone.
"""
