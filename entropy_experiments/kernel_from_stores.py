"""Kernels from stored gradients by their public path; the code lives in kernel/store."""

from entropy_experiments.kernel.store.kernel_from_stores import kernel_from_stores

__all__ = ["kernel_from_stores"]
