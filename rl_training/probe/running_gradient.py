"""A running average of entropy gradients: less noise for a little staleness.

    average = sum_j keep^age_j g_j / sum_j keep^age_j        age_j: optimizer steps since g_j was taken, against the newest

The gradient of entropy changes slowly from step to step, while one taken on a few sequences is mostly noise; steps in a row
point in similar directions, so that the noise of their predictions would be shared. See docs/decisions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from entropy_core.fold_gradients import FoldGradients


class RunningGradient:
    """keep: weight of a gradient relative to one of the next step; 0 keeps the newest alone. value, weight: to go on from."""

    def __init__(self, keep: float, value: FoldGradients | None = None, weight: float = 0.0) -> None:
        self._keep = keep
        self.weight = weight
        """Of all gradients so far, relative to the newest."""
        self.value = value

    def add(self, newest: FoldGradients, steps: int = 1) -> None:
        """Take in a gradient that is `steps` optimizer steps newer than the last; it is kept or overwritten, so the caller must
        not go on using it.

        Another number of folds than before (a step with fewer prompts) begins the average anew.
        """
        older = self._keep**steps * self.weight
        if self.value is None or older == 0.0 or self.value.count != newest.count:
            self.value, self.weight = newest, 1.0
            return
        self.value = self.value.blend(newest, older / (older + 1.0))
        self.weight = older + 1.0


def known(average: RunningGradient) -> FoldGradients:
    """The value of an average that has taken in a gradient."""
    assert average.value is not None
    return average.value


def keep_those_of(
    parameters: Mapping[str, Tensor], averages: dict[str, RunningGradient], newest: dict[str, FoldGradients]
) -> None:
    """Drop gradients over another set of trainable parameters than today's: they predict nothing."""
    for key in [k for k, a in averages.items() if a.value is None or a.value.folds.keys() != parameters.keys()]:
        del averages[key]
    for key in [k for k, gradient in newest.items() if gradient.folds.keys() != parameters.keys()]:
        del newest[key]
