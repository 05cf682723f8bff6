"""The audit of a trainer's own log: logged values held against values recomputed from recorded sequences and checkpoints."""
