"""The probe's own passes over sequences that it watches: token statistics, and gradients of entropy in folds of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, normalized_weights
from entropy_core.fold_gradients import FoldGradients, fold_gradients, shared_statistics
from entropy_core.passes.fold_rows import FoldRows
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.state import PassState
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from rl_training.probe.observation import Observation, joint_log_weights
from rl_training.probe.step_prediction import Objective, Wanted, coefficients_of, without_critic


class ObservedPasses:
    """Passes of one model.

    Args:
        model: the policy.
        sharing: processes that are given the same batches.
        folds: parts of the prompts that gradients are kept in.
        say: takes a sentence for the user, once each.
    """

    def __init__(self, model: nn.Module, sharing: Processes, folds: int, say: Callable[[str], None]) -> None:
        self._model, self._sharing, self._folds, self._say = model, sharing, folds, say
        self.prefixes = PrefixSharing(model, sharing)
        """Whether prompts pass once, found out on the batches so far."""
        self._passes = PassState(model, true_derivatives=True)
        self.rows = FoldRows()
        """How per-sequence gradients are formed here, and why not where they cannot be."""

    def statistics(self, batch: SequenceBatch, with_variances: bool = False) -> TokenStatistics:
        """Token statistics under the model as it is now, without gradients."""
        with self._passes:
            return shared_statistics(self._model, batch, self.prefixes.buckets(batch), self._sharing, with_variances)

    def gradients(
        self,
        batch: SequenceBatch,
        drawn_scores: Tensor | None,
        prior_log_weights: Tensor | None,
        wanted: Mapping[str, Wanted],
        with_variances: bool = False,
        critic: Objective = without_critic,
    ) -> tuple[Observation, dict[str, FoldGradients]]:
        """Gradients under the model as it is now.

        Args:
            batch: sequences.
            drawn_scores: (N,) log-probabilities under the policy that drew them; None where that is today's.
            prior_log_weights: (N,) further log-weights; None where there are none.
            wanted: by the name that each gradient is to have.
            with_variances: the statistics hold `surprisal_variances`.
            critic: what the estimator of that name differentiates.

        Returns:
            What was seen of the tokens, and the gradients by name.
        """
        log_weights: Tensor | None = None

        def objectives(statistics: TokenStatistics) -> list[TokenCoefficients]:
            nonlocal log_weights
            log_weights = joint_log_weights(statistics, drawn_scores, prior_log_weights)
            weights = None if log_weights is None else normalized_weights(log_weights)
            return coefficients_of(wanted.values(), statistics, batch, weights, critic)

        with self._passes, self._passes.attached_norms():
            found, statistics = fold_gradients(
                self._model,
                batch,
                objectives,
                self.prefixes.buckets(batch),
                self._folds,
                self._sharing,
                self.rows,
                with_variances,
            )
        if self.rows.failure is not None:
            self._say(
                f"{self.rows.failure}; predictions are right all the same, from one plain backward pass over "
                "each fold of prompts in place of one over all (as many tokens, in smaller pieces)"
            )
        return Observation(batch, statistics, log_weights), dict(zip(wanted, found, strict=True))
