"""Per-sequence gradients on disk: shards with digests, their fingerprint, and kernels formed from them.

Imports run and entropy_core.
"""
