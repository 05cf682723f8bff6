"""An independent answer to hold `entropy_core` against.

Everything here is computed the long way: every completion of a small policy is enumerated in float64,
gradients come from autograd straight through the enumerated sums, sequences go through a model one at a time
without padding. Nothing is imported from the packages under test (`test_independence.py` enforces it): an
oracle that shares a formula with its subject shares its mistakes.
"""
