"""A synthetic analysis for the tests of the weighting schemes: two buffers of explicit gradient vectors, and the table's
numbers computed from them by definition, with updates formed in parameter space and jackknives by loops."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels
from entropy_experiments.records.record import Record, json_of
from entropy_experiments.records.weighting_results import WeightingResult, WeightingRow

LONGEST = 9
FACTOR = 3e-3


@dataclass(frozen=True)
class World:
    """Gradient vectors of two buffers and what is computed from them."""

    eval_scores: np.ndarray
    eval_entropies: np.ndarray
    train_scores: np.ndarray
    kernel_p: np.ndarray
    step_p: np.ndarray
    arrays: KernelArrays

    def update(self, weights: np.ndarray) -> np.ndarray:
        return FACTOR * self.kernel_p * sum(w * s for w, s in zip(weights, self.train_scores, strict=True))

    def change(self, weights: np.ndarray) -> float:
        step = FACTOR * self.step_p * sum(w * s for w, s in zip(weights, self.train_scores, strict=True))
        return float(self.eval_entropies.mean(0) @ step)

    def change_without(self, weights: np.ndarray, prompt: int) -> float:
        """dh with an evaluation prompt left out: P_t for the centre, the kernel's P for what leaving it out changes."""
        kept = self.arrays.evaluation.prompt_index != prompt
        moved = self.eval_entropies[kept].mean(0) - self.eval_entropies.mean(0)
        return self.change(weights) + float(moved @ self.update(weights))

    def gain(self, weights: np.ndarray, without: int | None = None) -> float:
        """Policy gradient of the reward with the mean of the others as baseline, along the update."""
        labels, update = self.arrays.evaluation, self.update(weights)
        kept = [t for t in range(len(labels)) if labels.prompt_index[t] != without]
        total = 0.0
        for t in kept:
            others = [labels.reward[s] for s in kept if s != t]
            total += (labels.reward[t] - sum(others) / len(others)) * float(self.eval_scores[t] @ update)
        return total / len(kept)


def row_of(table: WeightingResult, name: str) -> WeightingRow:
    return next(row for row in table.rows if row.name == name)


def spread(left_out: list[float]) -> float:
    """The jackknife's standard error by its definition."""
    count, mean = len(left_out), sum(left_out) / len(left_out)
    return math.sqrt((count - 1) / count * sum((x - mean) ** 2 for x in left_out))


def labels(prompt_index: list[int], reward: np.ndarray, generator: np.random.Generator) -> SequenceLabels:
    count = len(prompt_index)
    length = generator.integers(2, LONGEST + 1, count)
    score = -length * generator.uniform(0.2, 2.0, count)
    texts = [f"text {n}" for n in range(count)]
    return SequenceLabels(np.array(prompt_index), reward, length, -score, score, texts, texts)


def make_world(
    seed: int = 0,
    eval_prompts: list[int] | None = None,
    train_prompts: list[int] | None = None,
    eval_reward: np.ndarray | None = None,
    train_reward: np.ndarray | None = None,
    signal: float = 2.0,
) -> World:
    """Rewarded sequences of both buffers lean towards one direction, along which entropy falls."""
    generator = np.random.default_rng(seed)
    eval_prompts = [p // 2 for p in range(32)] if eval_prompts is None else eval_prompts
    train_prompts = [7, 3, 7, 11, 3, 11, 7, 3, 11, 7] if train_prompts is None else train_prompts
    n_eval, n_train, width = len(eval_prompts), len(train_prompts), 7
    if eval_reward is None:
        eval_reward = generator.integers(0, 2, n_eval).astype(float)
    if train_reward is None:
        train_reward = np.array([1.0, 0, 0, 1, 1, 0, 0.5, 0, 0, 1])[:n_train]
    towards = np.eye(width)[0]
    lean = np.nan_to_num(eval_reward)[:, None] - 0.5
    eval_scores = signal * lean * towards + 0.5 * generator.normal(size=(n_eval, width))
    train_scores = signal * (np.nan_to_num(train_reward)[:, None] - 0.5) * towards
    train_scores = train_scores + 0.5 * generator.normal(size=(n_train, width))
    eval_entropies = -towards + 0.3 * generator.normal(size=(n_eval, width))
    kernel_p = generator.uniform(0.5, 2.0, width)
    step_p = kernel_p * generator.uniform(0.8, 1.2, width)
    evaluation = labels(eval_prompts, eval_reward, generator)
    training = labels(train_prompts, train_reward, generator)
    group_mean = np.array([train_reward[training.prompt_index == p].mean() for p in training.prompt_index])
    advantages = train_reward - group_mean
    weights = advantages / (n_train * LONGEST) * np.where(advantages > 0, 1.25, 1.0)  # no scheme of the table
    products = train_scores @ (step_p * eval_entropies.mean(0))
    arrays = KernelArrays(
        evaluation=evaluation,
        training=training,
        fisher=eval_scores * kernel_p @ train_scores.T,
        entropy_fisher=eval_entropies * kernel_p @ train_scores.T,
        train_fisher=train_scores * kernel_p @ train_scores.T,
        train_entropy_fisher=np.zeros((n_train, n_train)),
        weights=weights,
        advantages=advantages,
        shares=FACTOR * weights * products,
        products=products,
        step_factor=FACTOR,
    )
    return World(eval_scores, eval_entropies, train_scores, kernel_p, step_p, arrays)


def assert_sound(value: Any) -> None:
    """No NaN anywhere, and every estimate without a value or a standard error says why."""
    if isinstance(value, Record):
        value = json_of(value)
    json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        if "standard_error" in value and "ratio" not in value and None in (value["value"], value["standard_error"]):
            assert value["reason"]
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        assert_sound(inner)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-14)
