"""What did entropy do over a run, was it predicted, what came with it, and what did the kernel do meanwhile?

    observed(a, b) = h(b) - h(a)                                    on the evaluation prompts that all checkpoints share
    expected(a, b) = g r(a) + (r(b) - r(a)) (g - 1)/2,   g = b - a steps          r(k): predicted change by the step after k

`expected` adds up what the steps between two checkpoints were predicted to do, taking the prediction to change evenly in
between; for checkpoints at every step it is r(a) alone. It differs from what happened by three things: the run took its own
batches, the prediction one fresh batch; first order; and completions drawn anew at b. Standard errors are joint jackknives over
the evaluation prompts: what is drawn on the training side is not in them.

Comparable from checkpoint to checkpoint are evaluation *prompts*: their completions, and the training sequences, are drawn anew.
docs/analyses/evolution.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.estimate_entries import finite_number
from entropy_experiments.records.evolution import (
    CheckpointChange,
    CheckpointRow,
    ClusterFlow,
    Comparable,
    EntropyPath,
    Evolution,
    KernelAlignment,
    KernelCosine,
    Laws,
    LosingPrompts,
    NextSteps,
    PromptSum,
    WholeRun,
)
from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.leave_one_out import read_leave_one_out
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.summary import Parts
from entropy_experiments.records.training_course import unfiltered_points
from entropy_experiments.records.zero_or_one import zeros_and_ones
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.sweep.evolution.cluster_flow import Clusters, cluster_flow, cluster_likeness
from entropy_experiments.sweep.evolution.entropy_law import law_over_training
from entropy_experiments.sweep.evolution.evolution_rows import checkpoint_row, prompts_of
from entropy_experiments.sweep.evolution.first_over_run import first_over_run
from entropy_experiments.sweep.evolution.kernel_alignment import (
    align_kernels,
    block_cosine,
    not_aligned,
    prompt_gram,
    rows_of_prompts,
)
from entropy_experiments.sweep.evolution.left_out_prompts import (
    Statistic,
    common_prompts,
    entropy_at,
    jackknifed,
    predicted_at,
    prompt_sums,
)
from entropy_experiments.sweep.evolution.reward_price import price_between
from entropy_experiments.sweep.evolution.summed_changes import Points, largest_of_sums, weighted_sum

_MOST_LOWERING = 5
_PARTS = tuple(Parts.model_fields)


def describe_evolution(
    checkpoints: Sequence[ResultsFolder], history: Sequence[HistoryRow], *, permutations: int = 999, seed: int = 0
) -> Evolution:
    """The whole analysis of one run; what cannot be computed is None, with a reason beside it.

    Args:
        checkpoints: Finished analyses of one run, in any order.
        history: Its log.
        permutations: Of the tests of kernel alignment.
        seed: Of these.

    Raises:
        ValueError: There is no checkpoint, or two are of one step.
    """
    folders = sorted(checkpoints, key=lambda results: results.summary.checkpoint.step)
    rows = [checkpoint_row(results) for results in folders]
    steps = [row.step for row in rows]
    if not rows or len(set(steps)) < len(steps):
        raise ValueError("an evolution needs at least one checkpoint, and each step once")
    buffers = [results.evaluation for results in folders]
    prompts = common_prompts(buffers)
    sums = prompt_sums(buffers, prompts)
    binary = zeros_and_ones(row["reward"] for b in buffers for row in b if finite_number(row["reward"]) is not None)
    pairs = [_Pair(folders[k], folders[k + 1], prompts) for k in range(len(rows) - 1)]
    return Evolution(
        unit="nats per token",
        checkpoints=rows,
        comparable=Comparable(prompts=len(prompts), of=len({row["prompt_index"] for b in buffers for row in b})),
        changes=[
            CheckpointChange(
                **_comparison(sums, steps, k, k + 1),
                losers=_losers(sums[k], sums[k + 1]),
                price=price_between(sums, k, k + 1, binary),
                alignment=pair.alignment(permutations, seed),
                cosine=pair.cosine(),
                flow=pair.flow(),
                likeness=pair.likeness(),
            )
            for k, pair in enumerate(pairs)
        ],
        path=EntropyPath(
            step=steps,
            observed=[jackknifed(_observed(0, k), sums) for k in range(len(steps))],
            expected=[jackknifed(_summed(steps, 0, k), sums) for k in range(len(steps))],
        ),
        whole=_whole(list(zip(folders, rows, strict=True)), sums, steps, binary),
        law=_laws(rows, history),
        history=history,
    )


def _laws(rows: Sequence[CheckpointRow], history: Sequence[HistoryRow]) -> Laws:
    """R = -a e^H + b over the run's own log, and over the analysed checkpoints."""
    rewarded = [(row.step, row.entropy.value, row.reward.value) for row in rows if row.reward is not None]
    known = [point for point in rewarded if None not in point]
    return Laws(
        training=law_over_training(*unfiltered_points(history)),
        evaluation=law_over_training(*zip(*known, strict=True)) if known else law_over_training([], [], []),
    )


def _expected(a: int, b: int, gap: int) -> Statistic:
    rates = predicted_at(a), predicted_at(b)
    return lambda totals: (
        gap * rates[0](totals) + (rates[1](totals) - rates[0](totals)) * (gap - 1) / 2 if gap > 1 else rates[0](totals)
    )


def _summed(steps: Sequence[int], a: int, b: int) -> Statistic:
    """expected(a, b), over the checkpoints between."""
    pieces = [_expected(k, k + 1, steps[k + 1] - steps[k]) for k in range(a, b)]
    return lambda totals: sum(piece(totals) for piece in pieces)


def _observed(a: int, b: int) -> Statistic:
    return lambda totals: entropy_at(b)(totals) - entropy_at(a)(totals)


def _comparison(sums: np.ndarray, steps: Sequence[int], a: int, b: int) -> dict[str, Any]:
    """The fields of `Comparison` between checkpoints a and b."""
    observed, expected = _observed(a, b), _summed(steps, a, b)
    return {
        "from_step": steps[a],
        "to_step": steps[b],
        "observed": jackknifed(observed, sums),
        "expected": jackknifed(expected, sums),
        "difference": jackknifed(lambda totals: observed(totals) - expected(totals), sums),
    }


class _Pair:
    """Kernels and clusters of two successive checkpoints; prompts: evaluation prompts of both."""

    def __init__(self, left: ResultsFolder, right: ResultsFolder, prompts: list[int]) -> None:
        folders = (left, right)
        self._columns = [prompts_of(folder.training) for folder in folders]
        found = [finished(folder.summary.analyses.sequence_clustering) for folder in folders]
        self._clusters: list[Clusters] = [result.labels for result in found if result is not None]
        self._missing = None
        if not all("fisher" in folder.kernels for folder in folders):
            self._missing = "a checkpoint has no kernel"
        if not prompts:
            self._missing = "the two checkpoints share no evaluation prompt"
        if self._missing is None:
            wanted = np.array(prompts)
            self._kernels = [rows_of_prompts(f.kernels["fisher"], prompts_of(f.evaluation), wanted) for f in folders]
            self._lengths = [_squared_lengths(folder) for folder in folders]

    def alignment(self, permutations: int, seed: int) -> KernelAlignment:
        if self._missing is not None:
            return not_aligned(self._missing)
        grams = [prompt_gram(kernel, own) for kernel, own in zip(self._kernels, self._lengths, strict=True)]
        return align_kernels(grams[0], grams[1], permutations=permutations, seed=seed)

    def cosine(self) -> KernelCosine:
        if self._missing is not None:
            return KernelCosine(value=None, prompts=0, reason=self._missing)
        return block_cosine(self._kernels[0], self._columns[0], self._kernels[1], self._columns[1])

    def flow(self) -> ClusterFlow:
        if len(self._clusters) == 2:
            return cluster_flow(self._clusters[0], self._columns[0], self._clusters[1], self._columns[1])
        reason = "clusters were not looked for at both checkpoints (analysis.sequence_clustering)"
        return ClusterFlow(prompts=None, earlier=(), later=(), flow=None, reason=reason)

    def likeness(self) -> list[list[float | None]] | None:
        if self._missing is not None or len(self._clusters) < 2 or not any(self._clusters[0]):
            return None
        return cluster_likeness(self._kernels[0], self._clusters[0], self._kernels[1], self._clusters[1])


def _squared_lengths(results: ResultsFolder) -> np.ndarray | None:
    """(n_train,) K1(i, i); None where that kernel was not stored."""
    kernel = results.kernels.get("train_fisher")
    return None if kernel is None else np.diag(kernel).astype(np.float64)


def _losers(left: np.ndarray, right: np.ndarray) -> LosingPrompts:
    """Rank correlation of the prompts' parts of the predicted changes; left, right: (len(SUMS), B) sums."""
    lost, reason, rank = [sums[4] / sums[5] for sums in (left, right)], None, None
    if len(lost[0]) < 4 or not all(np.isfinite(parts).all() for parts in lost):
        reason = "fewer than 4 prompts have a part of the predicted change at both checkpoints"
    elif min(np.ptp(parts) for parts in lost) == 0:
        reason = "all prompts have the same part"
    else:
        rank = float(stats.spearmanr(*lost).statistic)
    return LosingPrompts(spearman=rank, prompts=len(lost[0]), reason=reason)


def _whole(points: Points, sums: np.ndarray, steps: list[int], binary: bool) -> WholeRun:
    last, weights = len(steps) - 1, _weights(steps)
    return WholeRun(
        **_comparison(sums, steps, 0, last),
        parts=Parts(**{part: weighted_sum(points, part, weights) for part in _PARTS}),
        largest_part=largest_of_sums(points, _PARTS, weights),
        prediction=_prediction(points),
        price=price_between(sums, 0, last, binary) if last else None,
        most_lowering_prompts=_most_lowering_prompts([folder for folder, _ in points]),
    )


def _weights(steps: Sequence[int]) -> list[float]:
    """How often the step after each checkpoint counts in the sum over the run: expected(a, b) is linear in r(a) and r(b)."""
    if len(steps) == 1:
        return [1.0]
    gaps = np.diff(steps)
    weights = np.zeros(len(steps))
    weights[:-1] += gaps - (gaps - 1) / 2
    weights[1:] += (gaps - 1) / 2
    return weights.tolist()


def _prediction(points: Points) -> NextSteps:
    both = [(point, pair) for point in points if (pair := point[1].predicted_and_measured) is not None]
    used = [point for point, _ in both if point[1].trustworthy is not False]
    values = np.array([pair for point, pair in both if point[1].trustworthy is not False]).reshape(-1, 2)
    compared = [row.agreement for _, row in used if row.agreement is not None]
    found, weights = correlation(*values.T), [1.0] * len(used)
    return NextSteps(
        steps=len(used),
        untrusted=len(both) - len(used),
        predicted=weighted_sum(used, "total", weights),
        actual=weighted_sum(used, "actual", weights),
        compared=len(compared),
        agreeing=sum(agreement.agrees for agreement in compared),
        correlation=None if found is None else found.value,
        correlation_interval=None if found is None else (found.low, found.high),
        reason=None if found else "fewer than four checkpoints have both, or they do not differ",
    )


def _most_lowering_prompts(folders: Sequence[ResultsFolder]) -> list[PromptSum]:
    """The training prompts whose sequences lowered entropy most, added up over the analysed steps."""
    shares: dict[int, list[float]] = {}
    texts: dict[int, str] = {}
    for row in (row for results in folders for row in results.training if row["delta_h"] is not None):
        shares.setdefault(row["prompt_index"], []).append(row["delta_h"])
        texts.setdefault(row["prompt_index"], row["prompt"])
    with_shares = [folder for folder in folders if any(row["delta_h"] is not None for row in folder.training)]
    tables = [read_leave_one_out(folder.path) for folder in with_shares]
    known = first_over_run({prompt: sum(values) for prompt, values in shares.items()}, tables)
    sums = [
        PromptSum(
            prompt_index=prompt,
            prompt=texts[prompt],
            share=sum(values),
            sequences=len(values),
            **({} if prompt not in known else asdict(known[prompt])),
        )
        for prompt, values in shares.items()
    ]
    return [one for one in sorted(sums, key=lambda one: one.share)[:_MOST_LOWERING] if one.share < 0]
