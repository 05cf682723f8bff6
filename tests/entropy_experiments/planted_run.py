"""A run whose evolution is known beforehand: finished analyses of its checkpoints, made of planted numbers, no model.

Entropy falls by planted steps, predictions are these steps (times `bias`), kernels are products of prompt features that turn
slowly (`drift`), rewards follow R = b - a e^h.
"""

import json
import math
from pathlib import Path

import numpy as np

from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.record import validated
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.summary import Summary
from entropy_experiments.statistics.agreement import paired_agreement
from tests.entropy_experiments.whole_summary import (
    buffer_record,
    clustering,
    estimate,
    history_of,
    measurement,
    parts,
    whole_run,
    whole_summary,
)

PROMPTS, TRAIN_PROMPTS, PER_PROMPT, FEATURES = 24, 6, 4, 10
A, B = 0.12, 1.0


def entropies(steps: int) -> np.ndarray:
    """A collapse from 1.9 to 0.3 nats per token."""
    return 0.3 + 1.6 / (1 + np.exp((np.arange(steps) - steps / 2) / (steps / 8)))


def _sequences(buffer, prompts, rng, entropy, reward, **columns):
    out = []
    hardness = np.random.default_rng(7).normal(size=200)  # a prompt is as hard at every checkpoint
    for row, prompt in enumerate(prompts):
        length = 4 + int(rng.integers(0, 5))
        content = {
            "buffer": buffer,
            "row": row,
            "prompt_index": int(prompt),
            "prompt": f"Say {prompt} + 1 =",
            "completion": f"it is {prompt + 1 + int(rng.integers(0, 2))}",
            "length": length,
            "entropy_sum": length * entropy * (1 + 0.2 * hardness[prompt] + 0.05 * rng.normal()),
            "reward": float(rng.random() < reward),
            "advantage": None,
            "delta_h": None,
            "delta_h_lost": None,
        }
        out.append(content | {key: values[row] for key, values in columns.items()})
    return out


def checkpoint(step, h, change, reward, features, rng, *, bias=1.0, clusters=True) -> ResultsFolder:
    """One analysis at `step`; change: what the next step does to entropy; features: (PROMPTS, FEATURES)."""
    contributions = change * bias / PROMPTS * (1 + 0.3 * rng.normal(size=PROMPTS))
    contributions += (change * bias - contributions.sum()) / PROMPTS
    evaluation = _sequences(
        "evaluation", range(100, 100 + PROMPTS), rng, h, reward, delta_h_lost=contributions.tolist()
    )
    train_prompts = np.repeat((step + np.arange(TRAIN_PROMPTS)) % 20, PER_PROMPT)
    advantages = np.tile([0.5, 0.5, -0.5, -0.5], TRAIN_PROMPTS)
    shares = 0.2 * change / len(train_prompts) * (1 + 0.5 * advantages)
    training = _sequences(
        "training", train_prompts, rng, h, 0.5, advantage=advantages.tolist(), delta_h=shares.tolist()
    )
    columns = rng.normal(size=(len(train_prompts), FEATURES))
    kernels = {"fisher": features @ columns.T, "train_fisher": columns @ columns.T}
    total = change * bias
    spent, tokens = (sum(row[key] for row in evaluation) for key in ("entropy_sum", "length"))
    series = 0.02 * np.tile([1.0, -1.0], PROMPTS // 2) / math.sqrt(PROMPTS - 1)  # a jackknife error of 0.02
    summary = whole_summary(
        checkpoint={"path": f"runs/planted/checkpoint-{step}", "step": step, "model": "planted"},
        entropy={
            "per_token": estimate(spent / tokens, 0.05, PROMPTS - 1),
            "per_completion": estimate(6 * h, 0.3, PROMPTS - 1),
            "surprisal_per_completion": estimate(6 * h, 0.4, PROMPTS - 1),
        },
        predicted={
            "rao_blackwell": parts(
                total, 0.2 * total, 0.75 * total, 0.05 * total, (0.02, 0.01, 0.015, 0.001), PROMPTS - 1
            )
        },
        actual={"snis": measurement(change, 0.02, h, 20.0, PROMPTS, PROMPTS - 1)},
        agreement={"rao_blackwell": paired_agreement(float(total - change), total - change + series).as_dict()},
        sampling={
            "evaluation": buffer_record(PROMPTS, PROMPTS),
            "training": buffer_record(TRAIN_PROMPTS, len(training))
            | {"rounds": 1, "generated": len(training), "rejected": 0, "kept": len(training), "filler": 0},
        },
        analyses={"sequence_clustering": clustering([1 + i % 2 for i in range(len(training))])} if clusters else {},
    )
    checks = [{"name": "rows = autograd", "passed": True, "value": 1e-6, "tolerance": 1e-4, "explanation": ""}]
    run = whole_run(self_checks=checks, seconds=60.0)
    records = (
        validated(RunRecord, run, "run.json"),
        validated(Summary, json.loads(json.dumps(summary)), "summary.json"),
    )
    return ResultsFolder(Path(f"planted_checkpoint-{step}"), *records, [], evaluation, training, kernels)


def planted_run(steps=12, *, every=1, bias=1.0, drift=0.15, seed=0, noise=0.02):
    """(checkpoints, history) of a run of `steps` steps whose every `every`-th is analysed."""
    rng = np.random.default_rng(seed)
    h = entropies(steps + 1)
    features = rng.normal(size=(PROMPTS, FEATURES))
    folders = []
    history = []
    for step in range(steps):
        reward = B - A * math.exp(h[step])
        history.append({"step": step, "entropy": float(h[step]), "reward": float(reward + noise * rng.normal())})
        if step % every == 0:
            folders.append(checkpoint(step, h[step], h[step + 1] - h[step], reward, features, rng, bias=bias))
        features = math.sqrt(1 - drift**2) * features + drift * rng.normal(size=features.shape)
    return folders, history_of(history)
