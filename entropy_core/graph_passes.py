"""Forward passes with graphs over the buckets of a batch, each ready for backward passes from one
or more objectives.

    objective(c) = sum_t sum_k [ c.entropy_tk H_tk + c.logprob_tk log pi_tk ]       (c frozen, entropy_core.entropy)

Coefficients may depend on the statistics of the whole batch (the mean entropy, say), which only a
pass shows. Then the graphs of the first buckets, as many as `token_batch_size` allows, are kept
side by side until their forward passes have shown them; only the other buckets take one more
forward pass, without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket, SequenceBatch, length_buckets
from entropy_core.cut_weights import open_cut
from entropy_core.entropy import TokenCoefficients
from entropy_core.passes.frozen_head import CompletionValues, completion_values
from entropy_core.passes.position_table import check_length
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.shared_prefix import shared_prefix_buckets
from entropy_core.passes.token_plan import TokenPlan
from entropy_core.scores import TokenStatistics, scatter_statistics, token_statistics

CoefficientsOf = Callable[[TokenStatistics], Sequence[TokenCoefficients]]
"""Objectives that depend on the token statistics of the batch."""


class GraphPasses:
    """The buckets of a batch in the order in which they pass, and each one's part of every
    objective.

    Args:
        smallest_first: otherwise in the order of `length_buckets`. Where coefficients are a
            function, the largest come first.
        sharing: asked whether a prompt passes once for all its completions; not asked where
            coefficients are a function. For sums over sequences, not for rows.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: SequenceBatch,
        coefficients: Sequence[TokenCoefficients] | CoefficientsOf,
        settings: PassSettings,
        smallest_first: bool = False,
        sharing: PrefixSharing | None = None,
    ) -> None:
        self._model, self._batch, self._coefficients = model, batch, coefficients
        self._settings = settings
        check_length(model, int(batch.scored_lengths.max()) - 1)
        self._buckets = length_buckets(batch, settings.token_batch_size, fewest=False)
        if callable(coefficients):
            # Held side by side, small buckets save no memory: one in which many beginnings are
            # alike takes less time.
            few = length_buckets(batch, settings.token_batch_size)
            if len(few) == 1 < len(self._buckets):
                plan = TokenPlan(few[0])
                if 2 * len(plan.distinct) <= len(plan.seen):
                    self._buckets = few
            self._buckets.sort(key=lambda bucket: -bucket.input_ids.numel())
        elif sharing is not None and open_cut(model) is None and sharing.shares(batch):
            self._buckets = shared_prefix_buckets(batch, settings.token_batch_size)
        elif smallest_first:
            self._buckets.sort(key=lambda bucket: bucket.input_ids.numel())

    def __len__(self) -> int:
        return len(self._buckets)

    def run(self, begin: Callable[[Bucket], None] = lambda bucket: None) -> Iterator[tuple[Bucket, list[Tensor]]]:
        """(bucket, its differentiable scalars), a forward pass each; `begin` is called before every
        such pass.

        The caller lets go of the scalars before it asks for the next.
        """
        coefficients, waiting = self._coefficients, []
        if callable(coefficients):
            for bucket in self._held():
                begin(bucket)
                waiting.append((bucket, self._pass(bucket, with_entropies=True)))
            coefficients = coefficients(self._statistics(waiting))
        with_entropies = any(bool(c.entropy.any()) for c in coefficients)
        rest = self._buckets[len(waiting) :]
        while waiting:
            yield _objectives(*waiting.pop(0), coefficients)
        for bucket in rest:
            begin(bucket)
            yield _objectives(bucket, self._pass(bucket, with_entropies), coefficients)

    def _pass(self, bucket: Bucket, with_entropies: bool) -> CompletionValues:
        return completion_values(self._model, bucket, self._batch.temperature, with_entropies=with_entropies)

    def _held(self) -> list[Bucket]:
        """The first buckets, one at least, whose graphs may be kept side by side."""
        tokens, held = 0, []
        for bucket in self._buckets:
            tokens += bucket.input_ids.numel()
            if held and tokens > self._settings.token_batch_size:
                break
            held.append(bucket)
        return held

    def _statistics(self, passed: Sequence[tuple[Bucket, CompletionValues]]) -> TokenStatistics:
        """The batch's, from buckets that have passed and a pass of all others."""
        sequences, columns = (torch.cat([getattr(b, name) for b, _ in passed]) for name in ("sequences", "columns"))
        logprobs = torch.cat([found.logprobs.detach() for _, found in passed])
        entropies = torch.cat([found.entropies.detach() for _, found in passed if found.entropies is not None])
        whole = scatter_statistics(self._batch, (sequences, columns), logprobs, entropies)
        if len(passed) < len(self._buckets):
            rest = torch.cat([bucket.indices for bucket in self._buckets[len(passed) :]])
            others = token_statistics(self._model, self._batch.select(rest), self._settings, all_digits=True)
            whole.logprobs[rest], whole.entropies[rest] = others.logprobs, others.entropies.to(whole.entropies.dtype)
        return whole


def _objectives(
    bucket: Bucket, found: CompletionValues, coefficients: Sequence[TokenCoefficients]
) -> tuple[Bucket, list[Tensor]]:
    at = (bucket.sequences, bucket.columns)
    return bucket, [weighted_sum(found.logprobs, found.entropies, c, at) for c in coefficients]


def weighted_sum(logprobs: Tensor, entropies: Tensor | None, c: TokenCoefficients, at: tuple[Tensor, Tensor]) -> Tensor:
    """sum_k [ c.entropy_k H_k + c.logprob_k log pi_k ] over tokens whose places in the batch are
    `at`; differentiable.

    Args:
        entropies: None where all c.entropy are 0.
    """
    scores = torch.dot(c.logprob[at].to(logprobs), logprobs)
    return scores if entropies is None else scores + torch.dot(c.entropy[at].to(entropies), entropies)
