"""A running average of entropy gradients: less noise for a little staleness.

    average_n = sum_j keep^j g_{n-j} / sum_j keep^j          (j = 0 the newest)

The gradient of entropy changes slowly from step to step, while one taken on a few sequences is mostly noise; steps in a row
push in similar directions, so that the noise of their predictions would be shared. See docs/decisions.
"""

from __future__ import annotations

from entropy_core.fold_gradients import FoldGradients


class RunningGradient:
    """keep: weight of each earlier gradient relative to the next; 0 keeps the newest alone."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self._weight = 0.0
        self.value: FoldGradients | None = None

    def add(self, newest: FoldGradients) -> None:
        """Take in a gradient; it is kept or overwritten, so the caller must not go on using it.

        Another number of folds than before (a step with fewer prompts) begins the average anew.
        """
        older = self._keep * self._weight
        if self.value is None or older == 0.0 or self.value.count != newest.count:
            self.value, self._weight = newest, 1.0
            return
        self.value = self.value.blend(newest, older / (older + 1.0))
        self._weight = older + 1.0
