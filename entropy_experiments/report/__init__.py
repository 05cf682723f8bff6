"""The report of one analysis: page, sections, tables, verdict, figures (matplotlib and interactive) and templates.

Imports analyses, records and statistics; computes no estimate of its own.
"""
