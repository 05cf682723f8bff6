"""The stored preconditioner by its public path; the code lives in kernel/store."""

from entropy_experiments.kernel.store.preconditioner_file import read_preconditioner, write_preconditioner

__all__ = ["read_preconditioner", "write_preconditioner"]
