"""A whole summary.json and run.json with planted numbers, as the records want them; tests change what they look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.reader import ResultsFolder
from entropy_experiments.records.record import validated
from entropy_experiments.records.run_record import Hardware, RunRecord
from entropy_experiments.records.summary import Summary
from entropy_experiments.records.sweep_record import SweepEntry, SweepRecord
from rl_training.intervals import interval


def estimate(value: float, error: float | None, freedom: float = 31.0) -> dict[str, Any]:
    """An estimate with Student's interval."""
    low, high = (None, None) if error is None else interval(value, error, freedom)
    return {
        "value": float(value),
        "standard_error": error,
        "low": low,
        "high": high,
        "degrees_of_freedom": None if error is None else freedom,
    }


def measurement(
    value: float, error: float, before: float, size: float, n: int, freedom: float = 31.0
) -> dict[str, Any]:
    """A measured change; without an interval where the effective sample size is below half."""
    found = estimate(value, error, freedom)
    trusted = size >= n / 2
    if not trusted:
        found |= dict.fromkeys(("low", "high", "degrees_of_freedom"))
    rest = {"trustworthy": trusted, "before": before, "after": before + value, "effective_sample_size": size, "n": n}
    return found | rest


def parts(
    total: float,
    batch: float,
    momentum: float,
    weight_decay: float,
    errors: tuple[float, ...],
    freedom: float = 31.0,
) -> dict[str, Any]:
    """A predicted change and its parts."""
    values = {"total": total, "batch": batch, "momentum": momentum, "weight_decay": weight_decay}
    return {name: estimate(value, error, freedom) for (name, value), error in zip(values.items(), errors, strict=True)}


def training_settings() -> dict[str, Any]:
    return {
        "scheme": "dr_grpo",
        "length_normalizer": "constant",
        "difficulty_weighting": False,
        "reject_zero_advantage": False,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-4,
        "prompts_per_step": 8,
        "completions_per_prompt": 8,
    }


def policy(**sampling_config: Any) -> dict[str, Any]:
    return {
        "tokenizer": "0123456789abcdef",
        "sampling_config": {"temperature": 1.0, "max_completion_length": 24} | sampling_config,
        "task": "sums",
        "training": training_settings(),
    }


def step_record(batch: float) -> dict[str, Any]:
    """summary.json's "attribution"."""
    return {
        "delta_h_batch": batch,
        "sum_of_shares": batch,
        "horizon_factor": 10.0,
        "preconditioner": "step",
        "kernel_preconditioner": "checkpoint",
        "gradient_norm": 0.5,
        "clip_coefficient": 1.0,
        "step_factor": 0.01,
    }


def buffer_record(
    prompts: int, sequences: int, mean_reward: float | None = 0.5, mean_length: float = 6.0
) -> dict[str, Any]:
    return {"prompts": prompts, "sequences": sequences, "mean_reward": mean_reward, "mean_length": mean_length}


def whole_summary(**content: Any) -> dict[str, Any]:
    """Every section; `content` replaces whole ones."""
    base = {
        "format_version": 2,
        "checkpoint": {"path": "runs/planted/checkpoint-8", "step": 8, "model": "planted"},
        "entropy": {
            "per_token": estimate(0.842, 0.071),
            "per_completion": estimate(5.9, 0.6),
            "surprisal_per_completion": estimate(6.1, 0.8),
        },
        "predicted": {},
        "predicted_per_completion": {},
        "actual": {},
        "agreement": {},
        "scaling": [],
        "attribution": step_record(-0.0125),
        "training_noise": None,
        "rows_drawn": True,
        "step_analysed": True,
        "kernel": None,
        "sampling": {
            "evaluation": buffer_record(32, 32),
            "training": buffer_record(8, 64) | {"rounds": 2, "generated": 96, "rejected": 32, "kept": 64, "filler": 0},
        },
        "leaving_out": None,
        "policy": policy(),
        "kernel_modules": {"parameters": 100, "trainable": 100, "patterns": None, "left_out_share": None},
        "gradient_rows": {"method": "hooks", "reason": None},
        "analyses": {},
    }
    return base | content


def whole_run(**content: Any) -> dict[str, Any]:
    """run.json; `content` replaces fields."""
    base = {
        "created": "2026-01-05T10:20:30+00:00",
        "command": "entropy-experiments analyze runs/collapse --config configs/fisher_analysis.yaml",
        "versions": {
            "entropy-experiments": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        },
        "git_sha": "0123456789abcdef0123456789abcdef01234567",
        "hardware": {"platform": "Linux", "processor": "x86_64", "threads": 2, "device": "cpu"},
        "processes": 1,
        "checkpoint": {
            "path": "runs/collapse/checkpoint-8",
            "step": 8,
            "model": "smollm2-135m",
            "run_dir": "runs/collapse",
        },
        "stages": [],
        "seconds": 0.0,
        "self_checks": [],
        "failed_analyses": {},
    }
    return base | content


def clustering(labels: list[int | None]) -> dict[str, Any]:
    """The result of sequence_clustering that found clusters with these labels and nothing else."""
    nothing = dict.fromkeys(("effective_rank", "participation_ratio", "rank_90", "most_negative"))
    spectrum = {"eigenvalues": [], **nothing, "reason": "planted"}
    return {
        "n_train": len(labels),
        "duplicates": {"sequences": len(labels), "distinct": len(labels), "equal_pairs": 0},
        "without_gradient": [],
        "sequences": list(range(len(labels))),
        "linkage": [],
        "leaf_order": list(range(len(labels))),
        "n_clusters": len(set(labels)),
        "silhouette": None,
        "agreement": None,
        "stability": None,
        "shared": None,
        "spectrum": {name: spectrum for name in ("cosine", "fisher", "distinct")},
        "level": 0.05,
        "seed": 0,
        "reason": None,
        "clusters": [],
        "labels": labels,
        "spectral_labels": labels,
    }


def sweep_record(entries: Sequence[SweepEntry], runs: dict[str, str], config: dict[str, Any]) -> SweepRecord:
    """A sweep.json of these checkpoints."""
    run = whole_run()
    made = {name: run[name] for name in ("created", "command", "versions", "git_sha")}
    return SweepRecord(
        format_version=2,
        **made,
        hardware=Hardware(**run["hardware"]),
        runs=runs,
        complete=all(entry.missing is None for entry in entries),
        checkpoints=entries,
        config=config,
    )


def history_of(rows: Sequence[dict[str, Any]]) -> list[HistoryRow]:
    """A run's log, as it is read."""
    return validated(list[HistoryRow], list(rows), "training_history.json")


def results_of(
    summary: dict[str, Any],
    history: Sequence[dict[str, Any]] = (),
    checks: Sequence[dict[str, Any]] = (),
    training: Sequence[dict[str, Any]] = (),
) -> ResultsFolder:
    """A results folder of this content, as it is read, without evaluation sequences and kernels."""
    run = validated(RunRecord, whole_run(self_checks=list(checks)), "run.json")
    return ResultsFolder(
        Path("planted"), run, validated(Summary, summary, "summary.json"), history_of(history), [], list(training), {}
    )
