"""The charts of an analysis, one subject a file: labelled arrays in, a matplotlib figure out.

Imports analyses (for orders of rows) and text.
"""
