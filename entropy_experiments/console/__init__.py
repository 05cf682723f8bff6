"""What the command line prints and asks for: progress, tables, doctor, demo, notebook.

Imports everything below; nothing but cli imports it.
"""
