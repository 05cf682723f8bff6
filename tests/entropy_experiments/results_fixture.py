"""A synthetic results folder of one analysis: consistent within itself, shaped like a real entropy collapse.

The numbers obey the identities of a real analysis: a sequence's share is its weight times the mean of its
column of the entropy-Fisher kernel, the shares add up to the batch part, the three parts add up to the
total, and the measured change departs from the prediction by a curvature term. Tests can therefore compare
a report with sums of their own.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from entropy_experiments.statistics.agreement import paired_agreement
from tests.entropy_experiments.analysis_fixture import make_analyses, train_kernel
from tests.entropy_experiments.whole_summary import measurement, parts, step_record, whole_run, whole_summary

N_EVALUATION, N_PROMPTS, PER_PROMPT = 32, 8, 8
# A difference with each of 32 prompts left out, up to its size: jackknife error 1.
SERIES = np.tile([1.0, -1.0], 16) / np.sqrt(31)
SCALES = (0.0625, 0.125, 0.25, 0.5, 1.0)
_TEMPLATE = (
    "<|im_start|>system\nAnswer with only the number.<|im_end|>\n<|im_start|>user\n"
    "State the final answer to the following arithmetic problem: {sum}<|im_end|>\n<|im_start|>assistant\n"
)
_WRONG = (
    "{x}.",
    "The answer is {x}",
    "{x} + 1 = {y}",
    "I think it is {y}, because 3 and",
    "<b>{x}</b>",
    "{y}",
)


def _sum_and_answer(generator: np.random.Generator) -> tuple[str, int]:
    a, b = (int(x) for x in generator.integers(1, 10, 2))
    return (f"{a} + {b} =", a + b) if generator.random() < 0.6 else (f"{a} - {b} =", a - b)


def _sequence(generator: np.random.Generator, prompt: str, answer: int, solved: bool) -> dict[str, Any]:
    other = answer + int(generator.integers(1, 6))
    text = str(answer) if solved else str(generator.choice(_WRONG)).format(x=other, y=answer - 1)
    length = max(2, len(text) // 2) if solved else min(24, len(text) // 2 + int(generator.integers(2, 9)))
    entropies = generator.gamma(1.2, 0.35 if solved else 0.9, length)
    logprobs = -generator.gamma(1.0, entropies.mean(), length)
    return {
        "prompt": prompt,
        "completion": text,
        "length": length,
        "truncated": length == 24,
        "prompt_ids": [1, 2, 3],
        "completion_ids": list(range(length)),
        "token_texts": _pieces(text, length),
        "entropies": entropies.tolist(),
        "logprobs": logprobs.tolist(),
        "score": float(logprobs.sum()),
        "entropy_sum": float(entropies.sum()),
        "reward": float(solved),
    }


def _pieces(text: str, length: int) -> list[str]:
    """`text` in as many pieces as there are tokens; of short texts some are empty, as those of unfinished characters are."""
    cuts = np.linspace(0, len(text), length + 1).astype(int)
    return [text[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def token_shares(share: float, length: int) -> list[float]:
    """Shares of both signs that add up to `share`."""
    waves = share * np.cos(1.7 * np.arange(length))
    return (waves + (share - waves.sum()) / length).tolist()


def make_sequences(
    generator: np.random.Generator,
    n_evaluation: int = N_EVALUATION,
    n_prompts: int = N_PROMPTS,
    per_prompt: int = PER_PROMPT,
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """(rows of both buffers, fisher, entropy_fisher); shares are in the rows."""
    evaluation, training = [], []
    for row in range(n_evaluation):
        question, answer = _sum_and_answer(generator)
        sequence = _sequence(generator, _TEMPLATE.format(sum=question), answer, generator.random() < 0.4)
        evaluation.append({"buffer": "evaluation", "row": row, "prompt_index": row} | sequence)
    for prompt in range(n_prompts):
        question, answer = _sum_and_answer(generator)
        solved = np.arange(per_prompt) < int(generator.integers(1, per_prompt))
        for k in generator.permutation(per_prompt):
            sequence = _sequence(generator, _TEMPLATE.format(sum=question), answer, bool(solved[k]))
            row = len(training)
            training.append({"buffer": "training", "row": row, "prompt_index": prompt} | sequence)
    directions = {True: generator.normal(size=12), False: generator.normal(size=12)}

    def features(rows: list[dict[str, Any]]) -> np.ndarray:
        own = [directions[row["reward"] > 0] + 1.5 * generator.normal(size=12) for row in rows]
        return np.array(own) * np.sqrt([[row["length"]] for row in rows]) * 30.0

    left, right = features(evaluation), features(training)
    fisher = (left @ right.T).astype(np.float32)
    push = right @ (-directions[True] + 0.3 * directions[False])
    noise = 250.0 * generator.normal(size=fisher.shape)
    entropy_fisher = (0.8 * push[None, :] + noise * np.abs(push).mean() / 150.0).astype(np.float32)

    mean_push = entropy_fisher.astype(np.float64).mean(axis=0)
    rewards = np.array([row["reward"] for row in training])
    groups = rewards.reshape(n_prompts, per_prompt)
    advantages = (groups - groups.mean(axis=1, keepdims=True)).ravel()
    weights = advantages / (len(training) * 24)
    scale = -0.0125 / (weights * mean_push).sum()
    shares = scale * weights * mean_push
    for row, advantage, weight, share in zip(training, advantages, weights, shares, strict=True):
        row |= {
            "advantage": float(advantage),
            "weight": float(weight),
            "delta_h": float(share),
            "delta_h_horizon": float(10 * share),
            "effect_of_leaving_out": float(0.8 * share + 0.05 * abs(share)),
            "delta_h_lost": None,
            "token_shares": token_shares(float(share), row["length"]),
        }
    for row in evaluation:
        row |= {
            "advantage": None,
            "weight": None,
            "delta_h": None,
            "delta_h_horizon": None,
            "effect_of_leaving_out": None,
            "token_shares": None,
            "delta_h_lost": float(generator.normal(-0.074, 0.1) / n_evaluation),
        }
    return evaluation + training, fisher, entropy_fisher


def make_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """summary.json for ``rows``: predicted −0.074 ± 0.018, measured −0.080 ± 0.022 nats per token."""
    training = [row for row in rows if row["buffer"] == "training"]
    evaluation = [row for row in rows if row["buffer"] == "evaluation"]
    batch = float(sum(row["delta_h"] for row in training))

    def split(total: float, error: float) -> dict[str, Any]:
        own, decay = batch * total / -0.074, -0.0004
        return parts(total, own, total - own - decay, decay, tuple(error * shrink for shrink in (1.0, 0.3, 0.9, 0.01)))

    predicted = {
        "rao_blackwell": split(-0.074, 0.018),
        "split": split(-0.0785, 0.024),
        "fixed_prefix": split(-0.031, 0.003),
        "score_function": split(-0.101, 0.046),
    }
    scaling = [
        {
            "scale": s,
            "predicted": -0.074 * s,
            "predicted_split": -0.0785 * s,
            "actual_snis": -0.0785 * s - 0.0015 * s * s,
            "predicted_fixed_prefix": -0.031 * s,
            "actual_fixed_prefix": -0.031 * s + 0.002 * s * s,
            "ess": 32 - 4.5 * s * s,
        }
        for s in SCALES
    ]

    def buffer_means(members: list[dict[str, Any]]) -> dict[str, float]:
        return {
            "mean_reward": float(np.mean([row["reward"] for row in members])),
            "mean_length": float(np.mean([row["length"] for row in members])),
        }

    return whole_summary(
        checkpoint={"path": "runs/collapse/checkpoint-8", "step": 8, "model": "smollm2-135m"},
        predicted=predicted,
        predicted_per_completion=predicted,
        actual={
            "snis": measurement(-0.08, 0.022, 0.842, 27.5, N_EVALUATION),
            "fixed_prefix": measurement(-0.029, 0.004, 0.842, N_EVALUATION, N_EVALUATION),
        },
        agreement={
            name: paired_agreement(gap, gap + error * SERIES).as_dict()
            for name, gap, error in (
                ("rao_blackwell", 0.006, 0.005),
                ("split", 0.0015, 0.001),
                ("score_function", -0.021, 0.03),
                ("fixed_prefix", -0.002, 0.002),
            )
        },
        scaling=scaling,
        attribution=step_record(batch),
        kernel={
            "n_eval": N_EVALUATION,
            "n_train": len(training),
            "mean": 12.0,
            "mean_abs": 3105.0,
            "same_prompt_pairs": 0,
            "same_prompt_mean": None,
            "cross_prompt_mean": 812.0,
            "same_prompts": False,
        },
        sampling={
            "evaluation": {"prompts": N_EVALUATION, "sequences": N_EVALUATION} | buffer_means(evaluation),
            "training": {"prompts": N_PROMPTS, "sequences": len(training), "rounds": 2, "generated": 96, "rejected": 32}
            | {"kept": 64, "filler": 0}
            | buffer_means(training),
        },
    )


def make_history(steps: int = 13) -> list[dict[str, Any]]:
    """training_history.json of a collapse: entropy 1.91 to 0.21 nats per token, reward 0.11 to 0.87."""
    generator = np.random.default_rng(7)
    progress = 1 / (1 + np.exp(-(np.arange(steps) - 6) / 1.7))
    progress = (progress - progress[0]) / (progress[-1] - progress[0]) if steps > 1 else progress
    entropy = 1.91 + (0.21 - 1.91) * progress
    history = []
    for step in range(steps):
        change = float(entropy[min(step + 1, steps - 1)] - entropy[step]) + 0.01 * generator.normal()
        wobble = 0.0 if step in (0, steps - 1) else 0.05 * generator.normal()
        history.append(
            {
                "step": step,
                "entropy": float(entropy[step] * (1 + wobble)),
                "reward": float(0.11 + 0.76 * progress[step]),
                "probe/entropy": float(0.95 * entropy[step]),
                "probe/predicted": change,
                "probe/predicted_se": 0.02,
                "probe/predicted_df": 3.0,
                "probe/batch": 0.15 * change,
                "probe/momentum": 0.85 * change,
                "probe/decay": 0.0,
                "probe/measured": change + 0.008 * float(generator.normal()),
                "probe/ess": 55.0,
            }
        )
    return history


def make_run() -> dict[str, Any]:
    """run.json with seven self-checks, all of them passed."""
    checks = (
        (
            "rows_sum_to_autograd",
            3.1e-7,
            1e-5,
            "sum of the per-sequence gradients against autograd's gradient of the sum",
        ),
        ("kernel_row_sums", 2.4e-4, 1e-3, "K1 times w against a directional derivative along the update"),
        (
            "surprisal_equals_entropy",
            0.31,
            3.0,
            "z-score of mean surprisal against mean entropy: the sampler's check",
        ),
        ("snis_slope", 0.004, 0.02, "slope of the reweighted measurement at 0 against its derivative"),
        ("optimizer_names_covered", 1.0, 1.0, "share of trainable parameters that have optimizer state"),
        ("split_sums_to_step", 8.0e-8, 1e-6, "batch + momentum + weight decay against the step taken"),
        ("shares_sum_to_batch", 5.0e-9, 1e-6, "sum of the shares against the batch part"),
    )
    stages = (("load checkpoint", 1.9), ("sample", 31.2), ("gradients", 88.4), ("measure", 20.5))
    return whole_run(
        stages=[{"name": name, "seconds": seconds} for name, seconds in stages],
        seconds=142.0,
        self_checks=[
            {"name": name, "passed": True, "value": value, "tolerance": tolerance, "explanation": explanation}
            for name, value, tolerance, explanation in checks
        ],
    )


def write_sequences(folder: Path, rows: list[dict[str, Any]]) -> None:
    """sequences.parquet of ``rows``."""
    pq.write_table(pa.Table.from_pylist(rows), folder / "sequences.parquet")


def write_json(folder: Path, name: str, content: Any) -> None:
    """One of the folder's JSON files."""
    (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


@functools.lru_cache
def _sequences(seed: int) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    return make_sequences(np.random.default_rng(seed))


@functools.lru_cache
def _analyses(seed: int) -> str:
    rows, *kernels = _sequences(seed)
    return json.dumps(make_analyses(rows, *kernels, make_summary(rows)), allow_nan=False)


def build_results(folder: Path, seed: int = 0, analyses: bool = False) -> Path:
    """Write a whole results folder and return it; `analyses`: with those of the questions, which take longer to draw.

    Change single files afterwards to make it odd.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, fisher, entropy_fisher = _sequences(seed)
    kernels = {"fisher": fisher, "entropy_fisher": entropy_fisher}
    summary = make_summary(rows)
    if analyses:
        kernels["train_fisher"] = train_kernel(fisher).astype(np.float32)
        summary["analyses"] = json.loads(_analyses(seed))
    write_sequences(folder, rows)
    save_file(kernels, folder / "kernel.safetensors")
    write_json(folder, "summary.json", summary)
    write_json(folder, "run.json", make_run())
    write_json(folder, "training_history.json", make_history())
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    return folder
