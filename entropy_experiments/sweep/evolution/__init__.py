"""What changes over the checkpoints of a run: one question a file, from the results folders of its analyses.

Imports records, statistics and entropy_core.
"""
