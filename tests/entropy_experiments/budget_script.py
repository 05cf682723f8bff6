"""Peak memory of whole analyses under budgets, each in a process of its own, forked from one that has only imported.

Takes cases as JSON on the command line; prints one JSON object a case: the case, its plan, the bytes of all training rows,
and the most memory that the process held before the analysis and in all (VmHWM), in bytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.passes.settings import PassSettings
from entropy_experiments.fisher_analyzer import analyze_batches
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from entropy_experiments.statistics.estimand import GIVEN_TOKENS
from entropy_experiments.step.settings import AnalysisSettings

TOKEN_BATCH_SIZE, EVALUATION = 256, 8


def policy(width: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    tied = {"vocab_size": vocabulary, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, **shape, **tied))


def batch(count: int, seed: int) -> SequenceBatch:
    tokens = torch.randint(1, 250, (count, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [n // 4 for n in range(count)]
    return SequenceBatch.from_sequences([t[:4] for t in tokens], [t[4:] for t in tokens], prompts, 0)


def most_memory() -> int:
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    model, n = policy(case["width"], case["vocabulary"]), case["sequences"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    train, evaluation = batch(n, 1), batch(EVALUATION, 2)
    model(input_ids=train.input_ids[:4], labels=train.input_ids[:4]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    work = UnfinishedWork(folder)
    budgets = {"memory_budget": case["budget"], "disk_budget": case.get("disk", 0)}
    places = {"workspace": work, "store_folder": folder / "gradients"}
    options = KernelOptions(**budgets, **places, save_gradients=case.get("save", False))
    weights = torch.linspace(-1, 1, n, dtype=torch.float64) / n
    more = KernelOptions(strategy="tiles", memory_budget=case["budget"] + 2**27)  # 128 MiB
    tile = more.plan(model, EVALUATION, n, PassSettings(TOKEN_BATCH_SIZE)).tile
    before = most_memory()
    analyze_batches(
        model, optimizer, evaluation, train, weights,
        AnalysisSettings(GIVEN_TOKENS, kernel=options, passes=PassSettings(TOKEN_BATCH_SIZE)),
    )  # fmt: skip
    peak = most_memory()
    return {
        **case,
        "plan": work.kept("plan"),
        "tile_with_more": tile,
        "rows": 4 * n * sum(p.numel() for p in model.parameters()),
        "before": before,
        "peak": peak,
    }


def main() -> None:
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(run(case, Path(folder))), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
