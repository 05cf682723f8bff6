"""The store of per-sequence gradients by its public path; it lives in kernel/store."""

from entropy_experiments.kernel.store.store import GradientStore

__all__ = ["GradientStore"]
