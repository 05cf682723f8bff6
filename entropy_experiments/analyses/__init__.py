"""One question a file, each a function of labelled arrays; `adapters` feeds them, `registry` runs them.

Imports records, fisher_analyzer and what lies below them; knows nothing of pages and figures.
"""
