"""Numbers, foreign text and tokens, made fit to be shown.

Imports nothing of this project.
"""
