"""The section "analyses" of a synthetic results folder: the real analyses, on the folder's own sequences and kernels."""

import numpy as np
import torch

from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels
from entropy_experiments.analyses.attribution import EvaluationTerms, TokenDetail, TrainingShares, attribute_step
from entropy_experiments.analyses.baselines import baseline_table
from entropy_experiments.analyses.buffers import compare_buffers
from entropy_experiments.analyses.clustering import sequence_clusters
from entropy_experiments.analyses.entropy_prediction import compare_prediction
from entropy_experiments.analyses.higher_order import DEFAULT_SCALES, measure_orders
from entropy_experiments.analyses.intervention import SharePrediction, prove_by_intervention
from entropy_experiments.analyses.prompt_structure import prompt_structure
from entropy_experiments.analyses.weighting_schemes import weighting_schemes
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.price_results import PriceRow, PricesResult
from entropy_experiments.records.record import json_of


def labels(rows):
    columns = {
        key: np.array([row[key] for row in rows], dtype=float) for key in ("reward", "length", "entropy_sum", "score")
    }
    texts = {key: [row[key] for row in rows] for key in ("prompt", "completion")}
    return SequenceLabels(np.array([row["prompt_index"] for row in rows]), **columns, **texts)


def train_kernel(fisher):
    """A positive semi-definite (n_train, n_train) matrix that goes with `fisher`."""
    columns = fisher.astype(np.float64)
    return columns.T @ columns / len(columns) / np.abs(columns).mean()


def kernel_arrays(rows, fisher, entropy_fisher):
    evaluation, training = ([row for row in rows if row["buffer"] == name] for name in ("evaluation", "training"))
    weights, shares, advantages = (np.array([r[k] for r in training]) for k in ("weight", "delta_h", "advantage"))
    products = entropy_fisher.astype(np.float64).mean(0)
    used = np.abs(weights * products) > 0
    generator = np.random.default_rng(3)
    return KernelArrays(
        evaluation=labels(evaluation),
        training=labels(training),
        fisher=fisher.astype(np.float64),
        entropy_fisher=entropy_fisher.astype(np.float64),
        train_fisher=train_kernel(fisher),
        train_entropy_fisher=products + products.std() * generator.normal(size=(len(training), len(training))),
        weights=weights,
        advantages=advantages,
        shares=shares,
        products=products,
        step_factor=float((shares[used] / (weights * products)[used]).mean()),
    )


def made_prices():
    """A price list of three interventions and one that is not priced: the analysis itself needs a model."""

    def estimate(value, error):
        ends = {"low": value - 2 * error, "high": value + 2 * error}
        return StudentEstimate(value=value, standard_error=error, degrees_of_freedom=11.0, **ends)

    rows = [PriceRow(name="run", label="as trained", entropy=estimate(-0.08, 0.01), reward=estimate(0.02, 0.005))]
    for name, kept, paid in (("lower_rate", 0.04, -0.01), ("entropy_bonus_0.01", 0.03, -0.002), ("grpo", -0.02, 0.004)):
        rows.append(
            PriceRow(
                name=name,
                label=name.replace("_", " "),
                entropy=estimate(-0.08 + kept, 0.01),
                reward=estimate(0.02 + paid, 0.005),
                entropy_minus_run=estimate(kept, 0.005),
                reward_minus_run=estimate(paid, 0.002),
                reward_per_nat=estimate(paid / kept, 0.1) if kept > 0 else None,
                covariance=-2e-6,
            )
        )
    rows.append(PriceRow(name="clip_higher", label="clip-higher", reason="changes nothing here"))
    alike = ["entropy_bonus_0.01", "lower_rate"]
    return PricesResult(rows=rows, alike=alike, keeps=0.25, n_eval=32, eval_prompts=12, judged_prompts=6)


def make_analyses(rows, fisher, entropy_fisher, summary):
    """All ten, each as summary.json holds what the analysis itself returns."""
    arrays, generator = kernel_arrays(rows, fisher, entropy_fisher), np.random.default_rng(5)
    contributions = np.array([row["delta_h_lost"] for row in rows if row["buffer"] == "evaluation"])
    lengths = arrays.training.length.astype(int)
    mask = np.arange(lengths.max()) < lengths[:, None]
    token_shares = np.where(mask, (arrays.shares / lengths)[:, None], 0.0)
    s = np.array(DEFAULT_SCALES)
    left_out = [-0.0785 * s - 0.01 * s**2 + 0.002 * generator.normal() * s for _ in range(12)]
    noise = 0.0005

    def measure(weights):
        kept = weights.numpy() != 0
        return float(arrays.shares[kept].sum() * 0.97 - 0.06 + noise * generator.normal())

    measured = [
        {
            "scale": row["scale"],
            "snis": {"change": row["actual_snis"], "standard_error": 0.02, "effective_sample_size": row["ess"], "sequences": 32},
            "fixed_prefix": {"change": row["actual_fixed_prefix"], "standard_error": 0.004},
            "fresh": {"change": row["actual_snis"] + 0.01, "standard_error": 0.05} if row["scale"] == 1 else None,
        }
        for row in summary["scaling"]
    ]  # fmt: skip
    predictions = {
        "split": SharePrediction(arrays.shares, -0.06),
        "rao_blackwell": SharePrediction(0.9 * arrays.shares, -0.06),
    }
    totals = {name: parts["total"] for name, parts in summary["predicted"].items()}
    cut = [np.array([row["truncated"] for row in rows if row["buffer"] == name]) for name in ("evaluation", "training")]
    actual = summary["actual"]
    results = {
        "buffers": compare_buffers(arrays.evaluation, arrays.training, (cut[0], cut[1])),
        "entropy_prediction": compare_prediction(totals, measured),
        "higher_order": measure_orders(
            s, -0.0785 * s - 0.01 * s**2, np.array(left_out), effective_sample_sizes=np.full(len(s), 30.0), sequences=32,
            slope=totals["split"],
        ),
        "attribution": attribute_step(
            TrainingShares(labels=arrays.training, shares=arrays.shares, horizon_factor=10.0),
            TokenDetail(shares=token_shares, mask=mask, texts=[[f"t{k}" for k in range(n)] for n in lengths]),
            EvaluationTerms(labels=arrays.evaluation, contributions=contributions, own_changes=2 * contributions),
        ),
        "intervention": prove_by_intervention(
            measure, arrays.weights, predictions, clip=lambda weights: float(torch.ones(()))
        ),
        "prompt_structure": prompt_structure(arrays, permutations=199),
        "sequence_clustering": sequence_clusters(arrays, rotations=19, resamples=10, permutations=99),
        "weighting_schemes": weighting_schemes(arrays, 24),
        "prices": made_prices(),
        "baselines": baseline_table(
            summary["predicted"], actual["snis"], measured_fixed_prefix=actual["fixed_prefix"], covariance=-0.2, steer=0.1
        ),
    }  # fmt: skip
    return {name: json_of(result) for name, result in results.items()}
