"""kronfluence: pairwise influence scores with the identity for its curvature; sqrt(P) goes onto each side's gradients."""

from __future__ import annotations

import logging
from itertools import count
from tempfile import mkdtemp
from typing import Any

import torch
from kernel_parts.cases import Case, Part, score, whole
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor
from torch.utils.data import TensorDataset

NEEDS = ("kronfluence",)
ATTENTION = "sdpa"
_numbers = count()


class _Scores(Task):
    enable_post_process_per_sample_gradient = True

    def __init__(self, preconditioner: dict[str, Tensor]) -> None:
        self._roots = {name.removesuffix(".weight"): p.sqrt() for name, p in preconditioner.items()}

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
        ids, mask = batch
        return score(model, Part(ids, ids, mask, ids)).sum()

    def compute_measurement(self, batch: Any, model: Any) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return list(self._roots)

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        return gradient * self._roots[module_name]


def wrap(case: Case, cut: bool) -> Any:
    logging.disable(logging.WARNING)
    task = _Scores(case.preconditioner)
    model = prepare_model(case.model, task)
    analyzer = Analyzer(
        "bench",
        model,
        task,
        cpu=case.rows.device.type == "cpu",
        output_dir=mkdtemp(prefix="bench-kronfluence-"),
        disable_tqdm=True,
        disable_model_save=True,
    )
    analyzer.fit_all_factors("none", _data(case.columns)[0], factor_args=FactorArguments(strategy="identity"))
    return analyzer


def kernel(handle: Any, case: Case) -> Tensor:
    (rows, row_order), (columns, column_order) = _data(case.rows), _data(case.columns)
    name = f"scores-{next(_numbers)}"
    handle.compute_pairwise_scores(
        name,
        "none",
        rows,
        columns,
        per_device_query_batch_size=len(rows),
        per_device_train_batch_size=len(columns),
        score_args=ScoreArguments(damping_factor=0.0),
        overwrite_output_dir=True,
    )
    scores = handle.load_pairwise_scores(name)
    out = torch.zeros(len(case.rows), len(case.columns))
    out[row_order[:, None], column_order] = scores["all_modules"].float()
    return out


def _data(side: Any) -> tuple[TensorDataset, Tensor]:
    part = whole(side)
    return TensorDataset(part.input_ids.cpu(), part.mask.cpu()), part.indices.cpu()
