"""The gradient of entropy in a few parts, one for each fold of the prompts, so that what it predicts has an error.

    g = sum_f g_f ,    g_f = sum of the rows E_t / n over the sequences t whose prompt is in fold f
    <g, d> = sum_f c_f = c ,    c_f = <g_f, d> ,    se^2 = sum_f (c_f - p_f c)^2 / (1 - sum_f p_f^2) ,    p_f = n_f / n

for any direction d, a step or a part of one. n_f of the n sequences are in fold f, so that c_f is expected to be p_f c: for
equal folds this is F/(F - 1) sum_f (c_f - mean c)^2, the jackknife over folds, and with as many folds as prompts the jackknife
over prompts. Taking unequal folds for equal ones would count their sizes as noise. Memory: F times the trainable parameters.

g_f comes from per-sequence rows in one pass over all folds (which is checked against autograd, entropy_core.passes.fold_rows),
or, where a model has no such rows, from a plain backward pass over each fold's own prompts: as many tokens, in F pieces.

Source: docs/theory/measurement-and-uncertainty.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket, SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.gradients import trainable_parameters
from entropy_core.graph_passes import weighted_sum
from entropy_core.passes.fold_rows import FoldRows
from entropy_core.passes.forward import true_parameter_gradients
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.gradient_hooks import RowHooks
from entropy_core.passes.prefix_sharing import Buckets
from entropy_core.passes.state import open_passes
from entropy_core.processes import ALONE, Processes
from entropy_core.scores import TokenStatistics
from entropy_core.uncertainty import Estimate, effective_degrees_of_freedom

# Elements summed in the gradients' own precision; such stretches are added up in float64.
_STRETCH = 2**15

# How a model says that hooks and row-wise derivatives do not suit it (vmap raises RuntimeError).
_ROWS_FAIL = (ValueError, RuntimeError, TypeError, NotImplementedError)

Objectives = Callable[[TokenStatistics], Sequence[TokenCoefficients]]


@dataclass(frozen=True)
class FoldGradients:
    """A gradient of entropy in F parts, one for each fold of the prompts.

    Attributes:
        folds: name -> (F, *shape), this process's part; `processes` adds up what several processes hold.
        shares: (F,) float64, the part of all sequences that each fold has, adding up to 1; None: equal parts.
    """

    folds: dict[str, Tensor]
    processes: Processes
    shares: Tensor | None = None

    @property
    def count(self) -> int:
        """How many folds there are."""
        return next(iter(self.folds.values())).shape[0]

    def total(self) -> dict[str, Tensor]:
        """Name -> the whole gradient, summed over folds and processes."""
        return {name: self.processes.sum(folds.sum(0)) for name, folds in self.folds.items()}

    def along(self, direction: Mapping[str, Tensor]) -> Tensor:
        """(F,) float64: <g_f, direction> of every fold, summed over processes.

        Raises:
            ValueError: names differ.
        """
        if direction.keys() != self.folds.keys():
            odd = sorted(direction.keys() ^ self.folds.keys())
            raise ValueError(f"gradient and direction cover different parameters ({len(odd)} names, e.g. {odd[0]!r})")
        some = next(iter(self.folds.values()))
        products = torch.zeros(self.count, dtype=torch.float64, device=some.device)
        for name, folds in self.folds.items():
            flat = folds.flatten(1)
            along = direction[name].flatten().to(flat.dtype)
            for start in range(0, flat.shape[1], _STRETCH):
                stretch = slice(start, start + _STRETCH)
                products += (flat[:, stretch] @ along[stretch]).double()
        return self.processes.sum(products)

    def predict(self, direction: Mapping[str, Tensor]) -> Estimate:
        """<g, direction> with its standard error over folds (NaN for one fold)."""
        return fold_estimate(self.along(direction), self.shares)

    def blend(self, newer: FoldGradients, keep: float) -> FoldGradients:
        """keep * self + (1 - keep) * newer, fold by fold, in this one's memory.

        Raises:
            ValueError: unequal fold numbers.
        """
        if self.count != newer.count:
            raise ValueError(f"{self.count} folds cannot be averaged with {newer.count}")
        for name, folds in self.folds.items():
            folds.lerp_(newer.folds[name], 1.0 - keep)
        if self.shares is None or newer.shares is None:
            return self
        return replace(self, shares=torch.lerp(self.shares, newer.shares, 1.0 - keep))


def fold_estimate(contributions: Tensor, shares: Tensor | None = None) -> Estimate:
    """Sum of (F,) independent contributions with its standard error; shares as in FoldGradients.

    Degrees of freedom: 1 / sum_f p_f^2 - 1, for equal folds F - 1, and fewer where one or two folds
    make most of the error: with four folds of skewed prompts Student's interval on 3 covers 88 to
    91%, on these 92 to 97% (benchmarks/results/calibration).
    """
    count, total = len(contributions), float(contributions.sum())
    if shares is None:
        shares = torch.full((count,), 1.0 / count, dtype=torch.float64)
    shares = shares.to(contributions)
    apart = 1.0 - float(shares.square().sum())
    if apart <= 1e-12:
        return Estimate(total)
    deviations = (contributions - shares * total) / apart**0.5
    freedom = min(1 / (1 - apart) - 1, effective_degrees_of_freedom(deviations))
    return Estimate(total, float(deviations.norm()), freedom, tuple(deviations.tolist()))


def fold_shares(fold_of: Tensor, folds: int) -> Tensor:
    """(F,) float64 share of the sequences that each fold has, from their (N,) fold numbers."""
    return torch.bincount(fold_of, minlength=folds).double().cpu() / len(fold_of)


def fold_of_sequences(prompt_index: Tensor, folds: int) -> Tensor:
    """(N,) fold number of each sequence; all completions of a prompt share a fold."""
    _, place = prompt_index.unique(return_inverse=True)
    return place % folds


def fold_gradients(
    model: nn.Module,
    batch: SequenceBatch,
    objectives: Objectives,
    buckets: Buckets,
    folds: int = 8,
    processes: Processes = ALONE,
    rows: FoldRows | None = None,
    with_variances: bool = False,
) -> tuple[list[FoldGradients], TokenStatistics]:
    """Gradients of every objective, and token statistics: one forward, a backward pass each.

    Args:
        objectives: from the whole batch's statistics to coefficients whose *mean over sequences* is meant (entropy_core.entropy).
        buckets: how rows are laid out (length_buckets, or shared_prefix_buckets).
        folds: at most as many as there are prompts are used; below 2 there is no error.
        rows: what is known of this model's rows, for several calls; then `rows.failure` says why plain passes were made, if any.
        with_variances: the statistics hold `surprisal_variances` as well. (Coefficients need the
            whole batch's statistics, so several buckets take a forward pass for them first.)
    """
    rows = rows or FoldRows()
    work = _Work(model, trainable_parameters(model), batch, objectives, processes, with_variances)
    count = max(1, min(folds, len(batch.prompt_index.unique())))
    fold_of = fold_of_sequences(batch.prompt_index, count)
    whole = _own_buckets(batch, buckets, processes)
    rows.begin(work.parameters)
    with open_passes(model), true_parameter_gradients(model), torch.enable_grad():
        known = rows.failure
        if count > 1 and known is None:
            found = _by_rows(work, whole, fold_of, count, rows)
            if found is not None:
                return found
        pieces = _pieces_of_folds(batch, buckets, processes, fold_of, count) if count > 1 else whole
        try:
            return _by_passes(work, pieces, fold_of, count, keep=len(whole) == 1)
        except Exception:
            rows.failure = known  # what failed both ways says nothing of rows
            raise


@dataclass(frozen=True)
class _Work:
    """What every way to take gradients needs."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    batch: SequenceBatch
    objectives: Objectives
    processes: Processes
    with_variances: bool

    def forward(self, bucket: Bucket, rows: bool) -> _Forward:
        return _Forward(self.model, self.parameters, self.batch, bucket, rows, self.with_variances)

    def statistics(self, kept: Sequence[_Forward], pieces: Sequence[Bucket]) -> TokenStatistics:
        """Of the whole batch, out of passes that were made already where there are some."""
        if kept:
            return _summed(_together([f.statistics() for f in kept]), self.processes)
        return _summed(_statistics(self.model, self.batch, pieces, self.with_variances), self.processes)

    def coefficients(self, statistics: TokenStatistics) -> list[TokenCoefficients]:
        return [c.scaled(1.0 / len(self.batch)) for c in self.objectives(statistics)]


def _by_rows(
    work: _Work, pieces: Sequence[Bucket], fold_of: Tensor, count: int, rows: FoldRows
) -> tuple[list[FoldGradients], TokenStatistics] | None:
    """From per-sequence rows, checked; None and `rows.failure` where that cannot be done.

    All processes come to the same answer: what one cannot do, none does.
    """
    kept: list[_Forward] = []
    trouble: str | None = None
    try:
        if len(pieces) == 1:
            kept = [work.forward(pieces[0], True)]
    except _ROWS_FAIL as error:
        trouble = str(error)
    if _any_fails(work, rows, trouble):
        return None
    statistics = work.statistics(kept, pieces)
    wanted = work.coefficients(statistics)
    found = [_zeros(work.parameters, count) for _ in wanted]
    try:
        for number, piece in enumerate(pieces):
            forward = kept.pop() if kept else work.forward(piece, True)
            forward.backward(wanted, fold_of, found, rows if number == 0 else None)
    except _ROWS_FAIL as error:
        trouble = str(error)
    if _any_fails(work, rows, trouble):
        return None
    return [FoldGradients(f, work.processes, fold_shares(fold_of, count)) for f in found], statistics


def _any_fails(work: _Work, rows: FoldRows, trouble: str | None) -> bool:
    if not work.processes.any(trouble is not None, work.batch.device):
        return False
    rows.fail(trouble or "another process could not form per-sequence gradients")
    return True


def _by_passes(
    work: _Work, pieces: Sequence[Bucket], fold_of: Tensor, count: int, keep: bool
) -> tuple[list[FoldGradients], TokenStatistics]:
    """By plain autograd, each piece of one fold alone.

    Args:
        keep: the graphs of all pieces may live side by side.
    """
    kept = [work.forward(piece, False) for piece in pieces] if keep else []
    statistics = work.statistics(kept, pieces)
    wanted = work.coefficients(statistics)
    found = [_zeros(work.parameters, count) for _ in wanted]
    kept.reverse()
    for piece in pieces:
        forward = kept.pop() if kept else work.forward(piece, False)
        forward.backward(wanted, fold_of, found)
        del forward  # its graph, before the next piece makes its own
    return [FoldGradients(f, work.processes, fold_shares(fold_of, count)) for f in found], statistics


def _pieces_of_folds(
    batch: SequenceBatch, buckets: Buckets, processes: Processes, fold_of: Tensor, count: int
) -> list[Bucket]:
    """This process's buckets, each with sequences of one fold."""
    mine = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    mine[processes.my_sequences(batch.prompt_index)] = True
    members = [(mine & (fold_of == fold)).nonzero()[:, 0] for fold in range(count)]
    return [piece for some in members if len(some) for piece in _placed(buckets(batch.select(some)), some)]


def shared_statistics(
    model: nn.Module,
    batch: SequenceBatch,
    buckets: Buckets,
    processes: Processes = ALONE,
    with_variances: bool = False,
) -> TokenStatistics:
    """Token statistics of the whole batch, without gradients, shared by the processes."""
    return _summed(_statistics(model, batch, _own_buckets(batch, buckets, processes), with_variances), processes)


def _own_buckets(batch: SequenceBatch, buckets: Buckets, processes: Processes) -> list[Bucket]:
    """This process's sequences in buckets, with their places in the batch; may be none."""
    if processes.size == 1:
        return buckets(batch)
    mine = processes.my_sequences(batch.prompt_index)
    return _placed(buckets(batch.select(mine)), mine) if len(mine) else []


def _placed(pieces: Sequence[Bucket], chosen: Tensor) -> list[Bucket]:
    """Buckets of `batch.select(chosen)` with places of the batch itself."""
    return [replace(piece, indices=chosen[piece.indices], sequences=chosen[piece.sequences]) for piece in pieces]


def _statistics(
    model: nn.Module, batch: SequenceBatch, pieces: Sequence[Bucket], with_variances: bool
) -> TokenStatistics:
    """Statistics of the tokens in these buckets, zero elsewhere."""
    full = _blank_statistics(model, batch, with_variances)
    with open_passes(model), torch.no_grad():
        for bucket in pieces:
            found = completion_values(model, bucket, batch.temperature, with_variances=with_variances)
            for tensor, values in zip(full, found, strict=False):
                assert values is not None
                tensor[bucket.sequences, bucket.columns] = values.to(tensor)
    return TokenStatistics(*full)


def _blank_statistics(model: nn.Module, batch: SequenceBatch, with_variances: bool) -> list[Tensor]:
    """Zeros, of types that do not depend on how the batch is passed: processes add theirs up."""
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    types = (dtype, torch.float64, dtype)[: 2 + with_variances]
    return [torch.zeros(batch.input_ids.shape, dtype=t, device=batch.device) for t in types]


def _summed(own: TokenStatistics, processes: Processes) -> TokenStatistics:
    return TokenStatistics(*(processes.sum(values) for values in _filled(own)))


def _together(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    """Statistics of pieces that have no sequence in common, each zero outside its own."""
    return TokenStatistics(*(torch.stack(same).sum(0) for same in zip(*map(_filled, parts), strict=True)))


def _filled(statistics: TokenStatistics) -> list[Tensor]:
    found = (statistics.logprobs, statistics.entropies, statistics.surprisal_variances)
    return [values for values in found if values is not None]


class _Forward:
    """One bucket's forward pass with its graph, ready for backward passes into folds."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        batch: SequenceBatch,
        bucket: Bucket,
        rows: bool,
        with_variances: bool,
    ) -> None:
        self._parameters, self._batch, self._bucket = parameters, batch, bucket
        self._blank = partial(_blank_statistics, model, batch, with_variances)
        self._hooks = RowHooks(model, parameters) if rows else None
        try:
            if self._hooks is not None:
                self._hooks.begin(bucket)
            found = completion_values(model, bucket, batch.temperature, with_variances=with_variances)
        finally:
            if self._hooks is not None:
                self._hooks.__exit__(None, None, None)
        assert found.entropies is not None
        self._logprobs, self._entropies = found.logprobs, found.entropies
        self._values = [v.detach() for v in found if v is not None]

    def statistics(self) -> TokenStatistics:
        full = self._blank()
        for tensor, values in zip(full, self._values, strict=True):
            tensor[self._bucket.sequences, self._bucket.columns] = values.to(tensor)
        return TokenStatistics(*full)

    def backward(
        self,
        wanted: Sequence[TokenCoefficients],
        fold_of: Tensor,
        found: Sequence[dict[str, Tensor]],
        checked: FoldRows | None = None,
    ) -> None:
        """Add this bucket's part of every objective to `found`.

        Args:
            checked: holds the first one's rows against autograd; the sums in `found` must be those
                of this bucket alone.
        """
        at, rows = (self._bucket.sequences, self._bucket.columns), fold_of[self._bucket.indices]
        for number, (coefficients, into) in enumerate(zip(wanted, found, strict=True)):
            objective = weighted_sum(self._logprobs, self._entropies, coefficients, at)
            keep = number + 1 < len(wanted)
            if self._hooks is not None:

                def add(name: str, r: Tensor, into: dict[str, Tensor] = into) -> None:
                    into[name].index_add_(0, rows, r.to(into[name]))

                names = checked.unseen() if checked is not None and number == 0 else []
                gradients = self._hooks.backward(objective, add, keep, [self._parameters[n] for n in names])
                if names:
                    assert checked is not None
                    checked.check(into, names, gradients)
                continue
            values = torch.autograd.grad(
                objective, list(self._parameters.values()), retain_graph=keep, allow_unused=True
            )
            for name, value in zip(self._parameters, values, strict=True):
                if value is not None:
                    into[name][rows[0]] += value  # all of one fold


def _zeros(parameters: Mapping[str, Tensor], folds: int) -> dict[str, Tensor]:
    return {
        name: torch.zeros((folds, *p.shape), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for name, p in parameters.items()
    }
