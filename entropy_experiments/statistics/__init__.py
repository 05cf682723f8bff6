"""Statistics that several rooms share: agreement by the paired error, correlations with intervals, paired differences.

Imports text and numpy alone (and the rule of intervals, rl_training.intervals).
"""
