"""The Fisher kernel inside a memory budget: plan, engine, blocks on disk, sketches, and the store of gradients.

Imports buffers (for unfinished work), run, config and entropy_core.
"""
