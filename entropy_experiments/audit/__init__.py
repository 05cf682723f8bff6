"""The audit of a trainer's own log: logged values checked against values recomputed from recorded
sequences and checkpoints.
"""
