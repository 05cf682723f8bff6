"""The results folder: its reader and writer, the training history, left-out estimates, the policy's record.

Imports fisher_analyzer, step and what lies below them.
"""
