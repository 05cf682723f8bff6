"""What the planner says of full fine-tuning of Qwen2.5's sizes, which this project has not run: the table of large-kernels.md.

    python benchmarks/plans_on_paper.py        seconds; models on the meta device, nothing is loaded and nothing is timed

128 evaluation and 256 training sequences of 768 tokens, all weights trained, 4 TB of disk, read at 5e9 bytes a second with one
device of 80 GiB and at 5e10 with eight.
"""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.forecast.cluster import plan_model
from entropy_experiments.forecast.cluster_plan import ClusterPlan
from rl_training.configuration import load_config

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
REST = {
    "0.5B": {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
CASES = (("0.5B", 1, 5e9), ("1.5B", 1, 5e9), ("1.5B", 8, 5e10), ("7B", 8, 5e10))
SIZES = ("entropy_analysis.eval_batch_size=128", "entropy_analysis.train_batch_size=256")
PROMPT, COMPLETION = 256, 512
READING = "exchanging and reading rows"


def plan(size: str, devices: int, bandwidth: float, matrix: bool) -> ClusterPlan:
    """With the matrix or without."""
    kernel = "entropy_analysis.fisher_kernel"
    overrides = [*SIZES, f"{kernel}.disk_budget=4TB", f"{kernel}.compute_full={str(matrix).lower()}"]
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[size], **REST[size]))
    config = load_config(FisherAnalysisConfig, None, overrides)
    return plan_model(model, config, devices, bandwidth, PROMPT, COMPLETION)


def table() -> str:
    """Markdown."""
    without, matrix = ([plan(*case, kept) for case in CASES] for kept in (False, True))
    rows = [
        ["", *(f"{size}, {'one' if devices == 1 else 'eight'}" for size, devices, _ in CASES)],
        ["---"] * (len(CASES) + 1),
        ["model in float32; a row; the graph of a sequence, GiB", *map(_sizes, matrix)],
        ["without the matrix", *map(_time, without)],
        ["with it: plan", *map(_kept, matrix)],
        ["with it: time, of which reading factors", *map(_reading, matrix)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _sizes(found: ClusterPlan) -> str:
    parts = (found.costs.weight_bytes, found.costs.row_bytes, found.costs.graph_bytes)
    return "; ".join(f"{part / 2**30:.2g}" for part in parts)


def _time(found: ClusterPlan) -> str:
    return _minutes(sum(found.seconds.values())) + _group(found)


def _kept(found: ClusterPlan) -> str:
    return f"`{found.kernel.strategy}`, {found.kernel.disk / 1e12:.1f} TB{_group(found)}"


def _reading(found: ClusterPlan) -> str:
    return f"{_minutes(sum(found.seconds.values()))}, {_minutes(found.seconds[READING])}"


def _group(found: ClusterPlan) -> str:
    return "" if found.group == 1 else f", {found.group} devices a model"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    print(table())
