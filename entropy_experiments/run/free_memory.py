"""Memory that the C library keeps for later, given back to the system between the parts of an analysis."""

from __future__ import annotations

import ctypes
import sys


def give_back_memory() -> None:
    """Where the C library can (glibc): after a pass over a large model it keeps gigabytes of freed activations."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
