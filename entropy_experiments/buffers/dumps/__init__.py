"""Rollouts that any trainer wrote down, one reader a format, in one table of sequences (rows.py).

What a dump does not hold is not made up: texts without token ids are tokenised with a note that says what can differ
(tokens.py), and recorded log-probabilities are held against the policy's (recorded_logprobs.py).
See docs/guides/rollouts.md.
"""
