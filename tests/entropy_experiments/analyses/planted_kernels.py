"""Kernels of explicit gradient vectors with structure that is known: K1 = G P G^T, KH = E P G^T."""

from dataclasses import dataclass

import numpy as np

from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels


@dataclass(frozen=True)
class Vectors:
    """Rows that the kernels are made of: gradients and entropy terms of both buffers, and the diagonal P."""

    gradients: np.ndarray
    entropy_rows: np.ndarray
    eval_gradients: np.ndarray
    eval_entropy_rows: np.ndarray
    preconditioner: np.ndarray


def labels(prompts, rewards=None, lengths=None, completions=None):
    n = len(prompts)
    return SequenceLabels(
        prompt_index=np.asarray(prompts),
        reward=np.full(n, np.nan) if rewards is None else np.asarray(rewards, dtype=float),
        length=np.full(n, 5) if lengths is None else np.asarray(lengths),
        entropy_sum=np.ones(n),
        score=-np.ones(n),
        prompt=[f"prompt {p}" for p in prompts],
        completion=[f"word {i}" for i in range(n)] if completions is None else list(completions),
    )


def kernels_of(vectors: Vectors, training: SequenceLabels, evaluation: SequenceLabels, weights=None, step_factor=2.0):
    v, n = vectors, len(training)
    scaled = (v.gradients * v.preconditioner).T
    w = np.linspace(-1.0, 1.5, n) / n if weights is None else np.asarray(weights)
    entropy_fisher = v.eval_entropy_rows @ scaled
    products = entropy_fisher.mean(0)
    return KernelArrays(
        evaluation=evaluation,
        training=training,
        fisher=v.eval_gradients @ scaled,
        entropy_fisher=entropy_fisher,
        train_fisher=v.gradients @ scaled,
        train_entropy_fisher=v.entropy_rows @ scaled,
        weights=w,
        advantages=np.sign(w),
        shares=step_factor * w * products,
        products=products,
        step_factor=step_factor,
    )


def unstructured(rng, prompts, dimension=40, rewards=None, eval_prompts=None, gradients=None, **label_columns):
    """Independent Gaussian gradients under a random P; `gradients` replaces them. Returns (kernels, vectors)."""
    n, eval_prompts = len(prompts), np.arange(5) + 1000 if eval_prompts is None else np.asarray(eval_prompts)
    rows = rng.normal(size=(n, dimension)) if gradients is None else gradients
    dimension = rows.shape[1]
    vectors = Vectors(
        gradients=rows,
        entropy_rows=rng.normal(size=(n, dimension)),
        eval_gradients=rng.normal(size=(len(eval_prompts), dimension)),
        eval_entropy_rows=rng.normal(size=(len(eval_prompts), dimension)),
        preconditioner=rng.uniform(0.5, 2.0, size=dimension),
    )
    return kernels_of(vectors, labels(prompts, rewards, **label_columns), labels(eval_prompts)), vectors


def two_families(rng, n_prompts=8, per_prompt=4, dimension=60, noise=0.25):
    """Gradients of even and of odd prompts along two orthogonal directions, lengths varying, and noise beside them."""
    prompts = np.repeat(np.arange(n_prompts), per_prompt)
    rows = noise * rng.normal(size=(len(prompts), dimension)) / np.sqrt(dimension / 4)
    rows[np.arange(len(prompts)), prompts % 2] += 1.0
    return prompts, rows * rng.uniform(0.5, 2.0, size=(len(prompts), 1))
