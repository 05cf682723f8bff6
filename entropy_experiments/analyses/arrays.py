"""What the analyses work on: arrays with labels, and nothing else. No model, no files.

Axes: t over evaluation sequences, i and j over training sequences. Kernels stand under the checkpoint's P unless said
otherwise; shares and step products under the step's own P_t (docs/theory/fisher-kernel.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SequenceLabels:
    """One buffer. All arrays (n,): prompt_index int; reward float64, NaN where nothing scored it; length in tokens;
    entropy_sum (sum of H_k) and score (log-probability), nats per completion; completion: the text.
    """

    prompt_index: np.ndarray
    reward: np.ndarray
    length: np.ndarray
    entropy_sum: np.ndarray
    score: np.ndarray
    prompt: list[str]
    completion: list[str]

    def __len__(self) -> int:
        return len(self.prompt_index)


@dataclass(frozen=True, kw_only=True)
class StepArrays:
    """One analysed step, float64.

    weights, advantages, shares: (n_train,) w_i, A_i and dH_i (nats per token, adding up to the step's batch part).
    products: (n_train,) <grad h, P_t dS_i>, so that shares = step_factor * weights * products, step_factor = lr (1 - beta1)/
    (1 - beta1^t) c. left_out_products: (B, n_train) the same with each evaluation prompt left out, in ascending order of index;
    None where not known.
    """

    evaluation: SequenceLabels
    training: SequenceLabels
    weights: np.ndarray
    advantages: np.ndarray
    shares: np.ndarray
    products: np.ndarray
    step_factor: float
    left_out_products: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class KernelArrays(StepArrays):
    """The step with the kernels of its analysis.

    fisher, entropy_fisher: (n_eval, n_train), K1(t, i) and KH(t, i).
    train_fisher, train_entropy_fisher: (n_train, n_train), the same with the training buffer on both sides (the first is
    symmetric and positive semi-definite; the second has E of the training sequence as its row).
    """

    fisher: np.ndarray
    entropy_fisher: np.ndarray
    train_fisher: np.ndarray
    train_entropy_fisher: np.ndarray
