"""The optimizer's step, taken apart: training side, parts, shares, gradients by row, real steps, and their checks.

Imports kernel, run and entropy_core.
"""
