"""Rows of one side into gradient stores, shard by shard: several kinds of rows from one forward pass.

A shard's sequences go through the model once, with one backward pass for every kind (the score, the terms of the entropy
gradient), and each kind's rows are written to its own store. A shard depends on its own sequences and on nothing else: it
has the same bytes whichever process writes it, after whatever interruption. Held: one shard's rows of every kind.

Source: docs/guides/gradient-store.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients
from entropy_core.gradients import emptied, keeping, stream_rows, trainable_parameters
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import Processes
from entropy_experiments.kernel.store.fingerprint import store_fingerprint
from entropy_experiments.kernel.store.layout import RowKind
from entropy_experiments.kernel.store.store import GradientStore
from entropy_experiments.run.reporter import SILENT, Reporter


@dataclass(frozen=True)
class StoredRows:
    """Rows of one kind and where they go. objective: what else tells them apart, e.g. the estimator."""

    folder: Path
    kind: RowKind
    coefficients: TokenCoefficients
    objective: dict[str, str] = field(default_factory=dict)


def store_rows(
    model: nn.Module,
    batch: SequenceBatch,
    wanted: Sequence[StoredRows],
    *,
    storage: str,
    shard_rows: int,
    passes: PassSettings,
    processes: Processes | None = None,
    formed: Mapping[str, Tensor] | None = None,
    reporter: Reporter = SILENT,
) -> list[GradientStore]:
    """Rows of `batch` over the trainable parameters, one store for each of `wanted`; finished shards are kept as they are.

    storage: their precision. shard_rows: sequences in a shard. processes: who share the shards, each calling this. formed:
    name -> (N, *shape), the rows themselves where only one kind is wanted and they are at hand. passes: how rows are formed;
    a store does not depend on it (the same numbers to rounding).
    Raises UserError as `GradientStore.resume` and `write_shard` do.
    """
    processes, passes = processes or Processes(), passes.remembering()
    shapes = {name: tuple(p.shape) for name, p in trainable_parameters(model).items()}
    stores = []
    for one in wanted:
        fingerprint = store_fingerprint(model, batch, one.kind, **one.objective)
        arguments = (one.folder, shapes, len(batch), one.kind, storage, shard_rows, fingerprint)
        processes.from_root(lambda arguments=arguments: GradientStore.resume(*arguments) and None)
        stores.append(GradientStore.open(one.folder))
    layout, missing = stores[0].layout, [set(store.unfinished_shards()) for store in stores]
    for number in processes.mine(sorted(set().union(*missing))):
        span = layout.shard_range(number)
        if formed is not None:
            found = [{name: kept[span.start : span.stop] for name, kept in formed.items()}]
        else:
            found = _rows(model, batch, list(span), wanted, passes)
        for one, store, unfinished, rows in zip(wanted, stores, missing, found, strict=True):
            if number in unfinished:
                store.write_shard(number, {name: part.to(batch.device) for name, part in rows.items()})
                reporter.block(one.folder.name, number + 1, layout.shard_count)
    processes.meet()
    for store in stores:
        store.check_complete()
    return [GradientStore.open(one.folder) for one in wanted]


def _rows(
    model: nn.Module,
    batch: SequenceBatch,
    span: list[int],
    wanted: Sequence[StoredRows],
    passes: PassSettings,
) -> list[dict[str, Tensor]]:
    """For every kind name -> (len(span), *shape): all kinds even where one is finished, so that bytes never differ."""
    parameters = trainable_parameters(model)
    rows = [
        {name: torch.zeros((len(span), *p.shape), device=p.device) for name, p in parameters.items()} for _ in wanted
    ]
    objectives = [TokenCoefficients(w.coefficients.entropy[span], w.coefficients.logprob[span]) for w in wanted]
    stream_rows(model, batch.select(span), objectives, keeping(rows), passes, restart=lambda: emptied(rows))
    return rows
