"""Tier 2: load a checkpoint, draw two independent batches, compute the cross Fisher kernel, say who moved entropy."""
