"""The entropy of held-out sequences and its gradient, from one pass; sequences of former steps are weighted to today's policy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, normalized_weights
from entropy_core.fold_gradients import fold_gradients
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.state import PassState
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from entropy_core.token_ratios import change_coefficients
from rl_training.probe.observation import Observation


class HeldOutLook:
    """Call it with sequences of held-out prompts.

    Args:
        model: the policy without wrappers.
        decay: lambda of the advantages of tokens (docs/theory/entropy-critic.md).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._prefixes, self._passes = PrefixSharing(model, Processes()), PassState(model, true_derivatives=True)

    def __call__(
        self, watched: SequenceBatch, scores_at_drawing: Callable[[Tensor], Tensor]
    ) -> tuple[Observation, dict[str, Tensor]]:
        """What was seen, and the gradient of h, name -> tensor of the parameter's shape.

        Args:
            scores_at_drawing: from the (N,) log-probabilities of `watched` today to those at their drawing.
        """
        log_weights: Tensor | None = None

        def objectives(statistics: TokenStatistics) -> list[TokenCoefficients]:
            nonlocal log_weights
            scores = statistics.scores()
            log_weights = scores - scores_at_drawing(scores).to(scores)
            return [self.coefficients(Observation(watched, statistics, log_weights))]

        with self._passes, self._passes.attached_norms():
            found, statistics = fold_gradients(
                self._model, watched, objectives, self._prefixes.buckets(watched), folds=1
            )
        return Observation(watched, statistics, log_weights), found[0].total()

    def coefficients(self, seen: Observation) -> TokenCoefficients:
        """Of the sum over `seen` whose mean over sequences is differentiated."""
        assert seen.log_weights is not None
        weights = normalized_weights(seen.log_weights)
        return change_coefficients(seen.statistics, seen.batch, None, self._decay, weights)
