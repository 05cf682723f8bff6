"""Analyses of many checkpoints: targets, shards, the folder's state, one table, one page, and `evolution` over training.

Imports entropy_runner, report and records. `run_sweep` can be imported from here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_experiments.sweep.run import run_sweep

__all__ = ["run_sweep"]


def __getattr__(name: str) -> Any:
    """Import sweep.run when it is first asked for: it needs torch."""
    if name in __all__:
        from entropy_experiments.sweep.run import run_sweep

        return run_sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
