"""The interactive figures of the page, as plotly's JSON.

Imports report.figures (for orders and colours) and text.
"""
