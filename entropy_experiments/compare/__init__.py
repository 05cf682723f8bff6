"""Two or more analyses side by side: differences with paired errors, their tables, page and verdict.

Imports report, records and statistics.
"""
