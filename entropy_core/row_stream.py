"""Streams of gradient rows: by hooks, checked on the way, or by a loop over sequences.

Rows go to a sink as they are found. Where hooks fail, the sink is emptied by its owner (`restart`)
and the stream begins anew by the loop, so that rows of two attempts never meet; without a `restart`
the first bucket takes one backward pass without the sink, which is where nearly all models show
what they are, and a failure after that is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket, SequenceBatch
from entropy_core.cut_weights import norm_of_parts, objective_gradients, open_cut
from entropy_core.entropy import TokenCoefficients
from entropy_core.graph_passes import CoefficientsOf, GraphPasses
from entropy_core.passes.factors import PlainRows, RowFactors
from entropy_core.passes.gradient_hooks import RowHooks
from entropy_core.passes.row_check import RowCheck, RowSums, RowSumsDifferError
from entropy_core.passes.row_formation import RowFormation, RowsNotFormedError
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.state import open_passes
from entropy_core.scores import token_statistics

RowSink = Callable[[int, str, Tensor, Any], None]
"""Takes (number of the objective, parameter name, (n,) indices into the batch, (n, *shape) rows),
both tensors on the device of the parameter; may be called more than once for the same name and
sequences: contributions add up. Of a factored stream RowFactors in place of rows."""

_APART_TOLERANCE = 1e-3


class RowStream:
    """Rows of one batch. parameters: the model's trainable ones. factored: the sink is sent RowFactors in place of rows."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        batch: SequenceBatch,
        coefficients: Sequence[TokenCoefficients] | CoefficientsOf,
        passes: PassSettings,
        factored: bool = False,
    ) -> None:
        self._model, self._parameters, self._batch, self._factored = model, parameters, batch, factored
        self._coefficients, self._settings = coefficients, passes

    def run(self, formation: RowFormation, sink: RowSink, restart: Callable[[], None] | None) -> None:
        """Send all rows. Raises RowsNotFormedError where `formation` allows no other way."""
        while not formation.looping:
            fed: list[bool] = []

            def feed(number: int, name: str, indices: Tensor, rows: Any, fed: list[bool] = fed) -> None:
                if not fed:
                    fed.append(True)
                sink(number, name, indices, rows)

            passes = GraphPasses(
                self._model,
                self._batch,
                self._coefficients,
                self._settings,
                smallest_first=formation.check is not None,
            )
            try:
                self._by_hooks(passes, formation, feed, rehearse=restart is None)
                return
            except Exception as error:
                # What only one process of a cut model meets it must not answer alone: the others are on their way by hooks.
                if open_cut(self._model) is not None and not isinstance(error, RowsNotFormedError):
                    raise
                formation.recover(error, bool(fed) and restart is None, len(self._batch), len(passes))
            if fed and restart is not None:
                restart()
        self._by_loop(sink)

    def _by_hooks(self, passes: GraphPasses, formation: RowFormation, sink: RowSink, rehearse: bool) -> None:
        check = formation.check
        with (
            open_passes(self._model),
            torch.enable_grad(),
            RowHooks(self._model, self._parameters, formation.copies, self._factored) as hooks,
        ):
            for bucket, objectives in passes.run(hooks.begin):
                due = {} if check is None else check.due(self._parameters, bucket)
                for number, objective in enumerate(objectives):
                    more = number + 1 < len(objectives)
                    if due and rehearse:
                        self._one_backward(hooks, bucket, objective, number, check, due, None, True)
                        due = {}
                    self._one_backward(hooks, bucket, objective, number, check, due, sink, more)
                rehearse = False
                del objectives, objective  # the graph, before the next bucket makes its own

    def _one_backward(
        self,
        hooks: RowHooks,
        bucket: Bucket,
        objective: Tensor,
        number: int,
        check: RowCheck | None,
        due: Mapping[str, nn.Parameter],
        sink: RowSink | None,
        more: bool,
    ) -> None:
        """One backward pass; rows of `due` are checked against autograd."""
        sums = RowSums(due, 0.0 if check is None else check.scale) if due else None
        single = _SingleRow(bucket, self._batch) if check is not None and due and not check.apart else None

        def receive(name: str, rows: Tensor | RowFactors) -> None:
            if sums is not None:
                sums.add(name, rows)
            if single is not None:
                single.add(name, rows)
            if sink is not None:
                sink(number, name, bucket.indices.to(rows.device), rows)

        gradients = hooks.backward(objective, receive, more, () if sums is None else sums.parameters)
        if sums is None or check is None:
            return
        try:
            agreed = bool(sums.errors(gradients))
        except RowSumsDifferError as error:
            raise self._not_formed(error) from error
        whole = len(due) == len(self._parameters)
        if agreed:
            check.passed(bucket, sums.norms(gradients), whole)
            check.scale = sums.scale if whole else check.scale
        if single is not None and single.place is not None and agreed and not callable(self._coefficients):
            with hooks.lifted():
                self._check_apart(single, self._coefficients[number])
            check.apart = True

    def _not_formed(self, error: RowSumsDifferError) -> ValueError:
        path, _, _ = error.parameter.rpartition(".")
        model = self._model.module if isinstance(self._model, nn.parallel.DistributedDataParallel) else self._model
        coarse = [p.dtype for p in self._parameters.values() if p.dtype.itemsize < 4]
        where = f"per-sequence gradients of {error.parameter!r}"
        if coarse:  # a loop would be as coarse
            return ValueError(
                f"{where} {error}: the model computes in {str(coarse[0]).removeprefix('torch.')}; load it in float32 (of an "
                "analysis: checkpoint.dtype=float32)"
            )
        kind = type(model.get_submodule(path)).__name__
        return RowsNotFormedError(
            f"{where} {error}: its module {path!r} ({kind}) or another uses it other than by being called"
        )

    def _check_apart(self, single: _SingleRow, coefficients: TokenCoefficients) -> None:
        """The row of a sequence that passed with others against its gradient alone."""
        assert single.place is not None
        index = int(single.bucket.indices[single.place])
        alone: dict[str, Tensor] = {}

        def keep(_number: int, name: str, _indices: Tensor, rows: Tensor | RowFactors) -> None:
            alone[name] = rows.row(0) if isinstance(rows, RowFactors) else rows[0]

        self._one_by_one([index], [coefficients], keep)
        norm = norm_of_parts(float(torch.stack([g.norm().double().cpu() for g in alone.values()]).norm()))
        off = torch.stack(
            [
                (single.rows.get(name, torch.zeros_like(p)) - alone.get(name, torch.zeros_like(p)))
                .norm()
                .double()
                .cpu()
                for name, p in self._parameters.items()
            ]
        ).norm()
        off = norm_of_parts(float(off))
        if off > _APART_TOLERANCE * norm:
            raise RowsNotFormedError(
                f"the gradient of sequence {index} is another alone than with the sequences that pass with it (off by "
                f"{off / norm:.1e} of its norm): the model mixes sequences, or does not hide padding; "
                "token_batch_size=1 passes each alone"
            )

    def _by_loop(self, sink: RowSink) -> None:
        coefficients = self._coefficients
        if callable(coefficients):
            coefficients = coefficients(token_statistics(self._model, self._batch, self._settings, all_digits=True))
        self._one_by_one(range(len(self._batch)), coefficients, sink)

    def _one_by_one(self, indices: Sequence[int], coefficients: Sequence[TokenCoefficients], sink: RowSink) -> None:
        """Each sequence alone: a forward pass, and a backward pass for every objective."""
        parameters = list(self._parameters.values())
        with open_passes(self._model), torch.enable_grad():
            for index in indices:
                own = slice(index, index + 1)
                chosen = [TokenCoefficients(c.entropy[own], c.logprob[own]) for c in coefficients]
                passes = GraphPasses(self._model, self._batch.select([index]), chosen, self._settings)
                for _, objectives in passes.run():
                    for number, objective in enumerate(objectives):
                        more = number + 1 < len(objectives)
                        found = objective_gradients(objective, parameters, more)
                        for name, gradient in zip(self._parameters, found, strict=True):
                            if gradient is not None:
                                dense = gradient.to_dense() if gradient.is_sparse else gradient
                                rows = PlainRows(dense[None]) if self._factored else dense[None]
                                sink(number, name, torch.tensor([index]).to(dense.device), rows)
                    del objectives, objective


class _SingleRow:
    """The row of the sequence of a bucket that has the most padding; place: which, None where it
    passes alone.
    """

    def __init__(self, bucket: Bucket, batch: SequenceBatch) -> None:
        self.bucket, self.rows = bucket, {}
        alone = len(bucket.indices) < 2 or len(batch) < 2
        self.place = None if alone else int(batch.scored_lengths[bucket.indices].argmin())

    def add(self, name: str, rows: Tensor | RowFactors) -> None:
        if self.place is not None:
            own = rows.row(self.place) if isinstance(rows, RowFactors) else rows[self.place].clone()
            self.rows[name] = self.rows[name] + own if name in self.rows else own
