"""What an analysis will cost in time and memory, before it is made.

Imports the parts of an analysis (analyses, kernel, buffers); no report.
"""
