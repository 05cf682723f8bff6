"""Fingerprints of gradients by their public path; they live in kernel/store."""

from entropy_experiments.kernel.store.fingerprint import Fingerprint, store_fingerprint

__all__ = ["Fingerprint", "store_fingerprint"]
