"""Between text and tokens: chat templates, tokenizers, left padding, and how a completion ended.

Imports rl_training.errors and entropy_core alone.
"""
