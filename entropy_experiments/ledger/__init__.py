"""Whose entropy was it over a whole run: every recorded step again, and its change divided among what went into it."""
