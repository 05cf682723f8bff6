"""The marimo notebook over a results folder, and the views that it shows.

Imports report and records.
"""
