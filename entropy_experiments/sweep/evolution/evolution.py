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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from entropy_experiments.records.analysis_results import finished
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.training_course import unfiltered_points
from entropy_experiments.statistics.confidence import BRACKETS, NOT_FROM_ZERO, shown
from entropy_experiments.statistics.correlation import correlation
from entropy_experiments.sweep.evolution.cluster_flow import cluster_flow, cluster_likeness
from entropy_experiments.sweep.evolution.entropy_law import law_over_training
from entropy_experiments.sweep.evolution.evolution_rows import PARTS, checkpoint_row
from entropy_experiments.sweep.evolution.kernel_alignment import (
    align_kernels,
    block_cosine,
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
from entropy_experiments.sweep.evolution.summed_changes import largest_of_sums, sums_with_errors, weighted_sum
from entropy_experiments.text.numbers import as_number, counted

_COSTLIEST = 5


def describe_evolution(
    checkpoints: Sequence[ResultsFolder],
    history: Sequence[Mapping[str, Any]],
    *,
    permutations: int = 999,
    seed: int = 0,
) -> dict[str, Any]:
    """The whole analysis of one run. No value is NaN: what cannot be computed is None, with a "reason" beside it.

    checkpoints: finished analyses of one run. history: its log, one mapping a training step with "step", and any of
    "entropy" and "reward" (results_writer.training_history).

    Returns "unit" and
        checkpoints   a row each, see `checkpoint_row`, by step
        comparable    {"prompts" (evaluation prompts in all checkpoints), "same_everywhere", "sentence"}
        changes       a row for each pair of successive checkpoints: from, to, observed, expected, difference (each {"value",
                      "standard_error"}), alignment (`align_kernels`), cosine (`block_cosine`), losers {"spearman", "prompts",
                      "reason"} (do the same prompts lose entropy?), flow (`cluster_flow`), likeness, price (`price_between`)
        path          {"step", "observed", "expected"} since the first checkpoint
        whole         observed, expected, difference, parts {batch, momentum, weight_decay}, prediction (see `_prediction`),
                      price, costliest_prompts
        law           {"training", "evaluation"}: `law_over_training` of the run's log, and of the evaluation buffers
        history       the log as given, sentence

    Raises ValueError without checkpoints, or for two of one step.
    """
    folders = sorted(checkpoints, key=lambda results: results.summary.checkpoint.step)
    rows = [checkpoint_row(results) for results in folders]
    steps = [row["step"] for row in rows]
    if not rows or len(set(steps)) < len(steps):
        raise ValueError("an evolution needs at least one checkpoint, and each step once")
    buffers = [results.evaluation for results in folders]
    prompts = common_prompts(buffers)
    sums = prompt_sums(buffers, prompts)
    changes = [
        _change(folders, rows, sums, prompts, k, permutations=permutations, seed=seed) for k in range(len(rows) - 1)
    ]
    result: dict[str, Any] = {
        "unit": "nats per token",
        "checkpoints": rows,
        "comparable": _comparable(buffers, prompts),
        "changes": changes,
        "path": _path(sums, steps),
        "whole": _whole(folders, rows, sums, steps),
        "law": {
            "training": law_over_training(*unfiltered_points(history)),
            "evaluation": law_over_training(*_points(_flat(rows), "entropy", "reward")),
        },
        "history": [dict(entry) for entry in history],
    }
    return result | {"sentence": _sentence(result)}


def _comparable(buffers: Sequence[Sequence[Mapping[str, Any]]], prompts: list[int]) -> dict[str, Any]:
    every = {row["prompt_index"] for rows in buffers for row in rows}
    same = len(every) == len(prompts)
    text = f"All {counted(len(buffers), 'checkpoint')} have the same {counted(len(prompts), 'evaluation prompt')}"
    if not same:
        text = f"{len(prompts)} of {counted(len(every), 'evaluation prompt')} are in every checkpoint; comparisons rest on these"
    note = "completions and training sequences are drawn anew at each, so that kernels are compared prompt by prompt"
    return {"prompts": len(prompts), "same_everywhere": same, "sentence": f"{text}; {note}."}


def _expected(rows_from: int, rows_to: int, gap: int) -> Statistic:
    a, b = predicted_at(rows_from), predicted_at(rows_to)
    return lambda totals: gap * a(totals) + (b(totals) - a(totals)) * (gap - 1) / 2 if gap > 1 else a(totals)


def _observed(a: int, b: int) -> Statistic:
    return lambda totals: entropy_at(b)(totals) - entropy_at(a)(totals)


def _path(sums: np.ndarray, steps: list[int]) -> dict[str, Any]:
    path: dict[str, Any] = {"step": steps, "observed": [], "expected": []}
    for k in range(len(steps)):
        path["observed"].append(jackknifed(_observed(0, k), sums))
        path["expected"].append(jackknifed(_summed(steps[: k + 1]), sums))
    return path


def _summed(steps: list[int]) -> Statistic:
    pieces = [_expected(k, k + 1, steps[k + 1] - steps[k]) for k in range(len(steps) - 1)]
    return lambda totals: sum(piece(totals) for piece in pieces)


def _comparison(sums: np.ndarray, observed: Statistic, expected: Statistic) -> dict[str, Any]:
    return {
        "observed": jackknifed(observed, sums),
        "expected": jackknifed(expected, sums),
        "difference": jackknifed(lambda totals: observed(totals) - expected(totals), sums),
    }


def _change(
    folders: Sequence[ResultsFolder],
    rows: Sequence[Mapping[str, Any]],
    sums: np.ndarray,
    prompts: list[int],
    k: int,
    *,
    permutations: int,
    seed: int,
) -> dict[str, Any]:
    left, right = folders[k], folders[k + 1]
    gap = rows[k + 1]["step"] - rows[k]["step"]
    columns = [np.array([row["prompt_index"] for row in side.training]) for side in (left, right)]
    found = [finished(side.summary.analyses.sequence_clustering) for side in (left, right)]
    clusters = [list(result.labels) for result in found if result is not None]
    change = {"from": rows[k]["step"], "to": rows[k + 1]["step"]}
    change |= _comparison(sums, _observed(k, k + 1), _expected(k, k + 1, gap))
    change |= {"losers": _losers(sums[k], sums[k + 1]), "price": price_between(sums, k, k + 1)}
    if len(clusters) == 2:
        flow = cluster_flow(clusters[0], columns[0], clusters[1], columns[1])
    else:
        reason = "clusters were not looked for at both checkpoints (analysis.sequence_clustering)"
        flow = {"prompts": None, "from": [], "to": [], "flow": None, "reason": reason}
    if "fisher" not in left.kernels or "fisher" not in right.kernels or not prompts:
        why = "the two checkpoints share no evaluation prompt" if not prompts else "a checkpoint has no kernel"
        nothing = {"value": None, "prompts": 0, "reason": why}
        alignment = nothing | {"standard_error": None, "p_value": None}
        return change | {"alignment": alignment, "cosine": nothing, "flow": flow, "likeness": None}
    kernels = [_by_prompt(side, prompts) for side in (left, right)]
    grams = [prompt_gram(kernel, _lengths(side)) for kernel, side in zip(kernels, (left, right), strict=True)]
    likeness = None
    if flow["from"]:
        likeness = cluster_likeness(kernels[0], clusters[0], kernels[1], clusters[1])
    return change | {
        "alignment": align_kernels(*grams, permutations=permutations, seed=seed),
        "cosine": block_cosine(kernels[0], columns[0], kernels[1], columns[1]),
        "flow": flow,
        "likeness": likeness,
    }


def _by_prompt(results: ResultsFolder, prompts: list[int]) -> np.ndarray:
    rows = np.array([row["prompt_index"] for row in results.evaluation])
    return rows_of_prompts(results.kernels["fisher"], rows, np.array(prompts))


def _lengths(results: ResultsFolder) -> np.ndarray | None:
    own = results.kernels.get("train_fisher")
    return None if own is None else np.diag(own).astype(np.float64)


def _losers(left: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Rank correlation of the prompts' parts of the predicted changes."""
    lost = [side[4] / side[5] for side in (left, right)]
    nothing = {"spearman": None, "prompts": len(lost[0])}
    if len(lost[0]) < 4 or not all(np.isfinite(side).all() for side in lost):
        return nothing | {"reason": "fewer than 4 prompts have a part of the predicted change at both checkpoints"}
    if min(np.ptp(side) for side in lost) == 0:
        return nothing | {"reason": "all prompts have the same part"}
    return nothing | {"spearman": float(stats.spearmanr(*lost).statistic), "reason": None}


def _whole(
    folders: Sequence[ResultsFolder], rows: Sequence[Mapping[str, Any]], sums: np.ndarray, steps: list[int]
) -> dict[str, Any]:
    last = len(steps) - 1
    return {
        "from": steps[0],
        "to": steps[last],
        **_comparison(sums, _observed(0, last), _summed(steps)),
        "parts": _parts(folders, rows, steps),
        "largest_part": largest_of_sums(list(zip(folders, rows, strict=True)), PARTS[1:], _weights(steps)),
        "prediction": _prediction(folders, rows),
        "price": price_between(sums, 0, last) if last else None,
        "costliest_prompts": _costliest_prompts(folders),
    }


def _parts(
    folders: Sequence[ResultsFolder], rows: Sequence[Mapping[str, Any]], steps: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """What each part of the steps was predicted to do over the run, added up as `expected` is; of one step, what it does."""
    points = list(zip(folders, rows, strict=True))
    return {part: weighted_sum(points, part, _weights(steps)) for part in PARTS[1:]}


def _weights(steps: Sequence[int]) -> list[float]:
    """How often the step after each checkpoint counts in the sum over the run: expected(a, b) is linear in r(a) and r(b)."""
    if len(steps) == 1:
        return [1.0]
    gaps = np.diff(steps)
    weights = np.zeros(len(steps))
    weights[:-1] += gaps - (gaps - 1) / 2
    weights[1:] += (gaps - 1) / 2
    return weights.tolist()


def _prediction(folders: Sequence[ResultsFolder], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Predicted and measured changes of the step after each checkpoint, over the checkpoints that have both and whose measurement
    can be trusted; `untrusted` counts the others.
    """
    both = [k for k, row in enumerate(rows) if row["predicted"]["total"] and row["actual"]]
    used = [k for k in both if rows[k]["trustworthy"] is not False]
    values = np.array([[rows[k]["predicted"]["total"]["value"], rows[k]["actual"]["value"]] for k in used])
    values = values.reshape(-1, 2)
    compared = [rows[k]["agreement"] for k in used if rows[k]["agreement"] is not None]
    found = correlation(*values.T)
    sums = sums_with_errors([(folders[k], rows[k]) for k in used])
    return {
        "steps": len(values),
        "untrusted": len(both) - len(used),
        **sums,
        "compared": len(compared),
        "agreeing": sum(entry["agrees"] for entry in compared),
        "correlation": None if found is None else found.value,
        "correlation_interval": None if found is None else [found.low, found.high],
        "reason": None if found else "fewer than four checkpoints have both, or they do not differ",
    }


def _costliest_prompts(folders: Sequence[ResultsFolder]) -> list[dict[str, Any]]:
    """The training prompts whose sequences took most entropy, added up over the analysed steps."""
    sums: dict[int, dict[str, Any]] = {}
    for results in folders:
        for row in results.training:
            if row.get("delta_h") is not None:
                entry = {"prompt_index": row["prompt_index"], "prompt": row["prompt"], "share": 0.0, "sequences": 0}
                entry = sums.setdefault(row["prompt_index"], entry)
                entry["share"] += row["delta_h"]
                entry["sequences"] += 1
    costly = sorted(sums.values(), key=lambda entry: entry["share"])[:_COSTLIEST]
    return [entry for entry in costly if entry["share"] < 0]


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"step": r["step"], **{key: r[key] and r[key]["value"] for key in ("entropy", "reward")}} for r in rows]


def _points(entries: Sequence[Mapping[str, Any]], *keys: str) -> list[list[float]]:
    """Columns step, *keys of the entries that have them all."""
    rows = [[as_number(entry.get(key)) for key in ("step", *keys)] for entry in entries]
    known = [[x for x in row if x is not None] for row in rows if None not in row]
    return [[row[c] for row in known] for c in range(1 + len(keys))]


def _sentence(result: Mapping[str, Any]) -> str:
    rows, whole = result["checkpoints"], result["whole"]
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return f"One checkpoint, step {first['step']}: entropy {shown(first['entropy'], plus=False)} nats per token."
    text = (
        f"From step {first['step']} to {last['step']} entropy on {counted(result['comparable']['prompts'], 'fixed prompt')} went "
        f"from {shown(first['entropy'], plus=False)} to {shown(last['entropy'], plus=False)} nats per token, a change of "
        f"{shown(whole['observed'])}; the predicted steps add up to {shown(whole['expected'])}"
    )
    prediction = whole["prediction"]
    if prediction["compared"]:
        text += (
            f"; at {prediction['agreeing']} of {prediction['compared']} checkpoints the difference of the next step's measured "
            f"change and its prediction {NOT_FROM_ZERO} (sums {shown(prediction['predicted'])} and "
            f"{shown(prediction['actual'])})"
        )
    return f"{text} ({BRACKETS})."
