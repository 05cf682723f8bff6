"""The settings that every pass over a batch takes: how large a pass is, and how per-sequence gradients come out of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from entropy_core.batch import DEFAULT_TOKEN_BATCH_SIZE
from entropy_core.passes.row_formation import Method, RowFormation


@dataclass(frozen=True)
class PassSettings:
    """How a batch passes through a model. No result depends on it beyond rounding.

    Attributes:
        token_batch_size: padded tokens in one pass, at most (one sequence at least); bounds the memory of a pass.
        method: how per-sequence gradients are formed (`entropy_core.passes.row_formation`). A `RowFormation` remembers over
            several calls what was checked and what failed.
        verify: whether per-sequence gradients are checked against autograd's own gradient; a `RowFormation` decides by itself.

    Raises:
        ValueError: a token_batch_size below 1, or an unknown method.

    Examples:
        >>> PassSettings(token_batch_size=1024).method
        'auto'
        >>> PassSettings(token_batch_size=0)
        Traceback (most recent call last):
            ...
        ValueError: token_batch_size is 0, it must be at least 1
    """

    token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE
    method: Method | RowFormation = "auto"
    verify: bool = True

    def __post_init__(self) -> None:
        if self.token_batch_size < 1:
            raise ValueError(f"token_batch_size must be at least 1, not {self.token_batch_size}")
        self.formation()

    def formation(self) -> RowFormation:
        """The `RowFormation` given as `method`, or a new one of that method."""
        return self.method if isinstance(self.method, RowFormation) else RowFormation(self.method, self.verify)

    def remembering(self) -> PassSettings:
        """The same settings with one `RowFormation` for all calls that they are given to."""
        return replace(self, method=self.formation())


DEFAULT_PASSES = PassSettings()
