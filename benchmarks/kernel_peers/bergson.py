"""bergson: an in-memory collector for the rows, a scorer fed by a second collector for the columns; Adam's normalizer gives
sqrt(P) on either side.

As in its own command line everything is frozen but the input embedding, which must require a gradient for its hooks to run.
"""

from __future__ import annotations

import logging
from tempfile import mkdtemp
from typing import Any

import torch
from bergson import CollectorComputer, GradientProcessor, InMemoryCollector, Scorer
from bergson.config.config import IndexConfig
from bergson.gradients import AdamNormalizer
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset
from kernel_parts.cases import Case, parts
from torch import Tensor

from entropy_core.batch import SequenceBatch

NEEDS = ("bergson",)
ATTENTION = "sdpa"


def wrap(case: Case, cut: bool) -> Any:
    logging.disable(logging.INFO)
    names = {name.removesuffix(".weight"): p for name, p in case.preconditioner.items()}
    case.model.requires_grad_(False)
    case.model.get_input_embeddings().requires_grad_(True)
    normalizers = {name: AdamNormalizer((p**-0.5 - 1e-8).square()) for name, p in names.items()}
    config = IndexConfig(run_path=mkdtemp(prefix="bench-bergson-"), loss_reduction="sum", projection_dim=0)
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    return GradientProcessor(normalizers=normalizers, projection_dim=None), config, set(names)


def kernel(handle: Any, case: Case) -> Tensor:
    processor, config, names = handle

    def collect(side: SequenceBatch, **settings: Any) -> InMemoryCollector:
        data = _dataset(side)
        collector = InMemoryCollector(
            model=case.model, data=data, cfg=config, processor=processor, target_modules=names, **settings
        )
        batches = [part.indices.tolist() for part in parts(side)]
        CollectorComputer(case.model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
        return collector

    queries = collect(case.rows).gradients
    device = case.rows.device
    writer = InMemorySequenceScoreWriter(len(case.columns), len(case.rows))
    collect(case.columns, scorer=Scorer(queries, sorted(names), writer, device, torch.float32))
    return writer.scores.T


def _dataset(side: SequenceBatch) -> Dataset:
    ids, labels = [], []
    for tokens, attended, chosen in zip(side.input_ids, side.attention_mask, side.completion_mask, strict=True):
        ids.append(tokens[attended].tolist())
        labels.append(torch.where(chosen, tokens, -100)[attended].tolist())
    return Dataset.from_dict({"input_ids": ids, "labels": labels})
