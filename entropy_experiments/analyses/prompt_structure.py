"""Do sequences of the same prompt move each other more than sequences of different prompts?

Means of the kernel over same-prompt and cross-prompt pairs. Source: docs/theory/fisher-kernel.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def kernel_structure(kernel: np.ndarray, eval_prompts: np.ndarray, train_prompts: np.ndarray) -> dict[str, Any]:
    """Summary of a (n_eval, n_train) kernel with prompt labels on both axes.

    same_prompt_mean is None where the two buffers share no prompt, cross_prompt_mean where they share the only one.
    """
    same = np.asarray(eval_prompts)[:, None] == np.asarray(train_prompts)[None, :]
    values = np.asarray(kernel, dtype=np.float64)
    return {
        "n_eval": int(values.shape[0]),
        "n_train": int(values.shape[1]),
        "mean": float(values.mean()),
        "mean_abs": float(np.abs(values).mean()),
        "same_prompt_pairs": int(same.sum()),
        "same_prompt_mean": float(values[same].mean()) if same.any() else None,
        "cross_prompt_mean": float(values[~same].mean()) if (~same).any() else None,
    }
