"""The trainer, its probe, and the parts of them that an analysis needs too: models, tasks,
sampling.
"""
