"""Two tiles of a kernel of 10,000 x 10,000 sequences over 5 million parameters, inside 8 GiB: run as a process of its own.

Prints one JSON object: the plan for the whole, and the peak memory of the tiles that were run.
"""

from __future__ import annotations

import json
import resource

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import trainable_parameters
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_core.passes.settings import PassSettings
from entropy_experiments.kernel.engine import Kernel, KernelEngine
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.kernel.row_passes import RowPasses
from entropy_experiments.kernel.strategy import KernelSetup

SEQUENCES, BUDGET, EVALUATION = 10_000, 8 * 2**30, 24


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **shape))


def batch(count: int, seed: int) -> SequenceBatch:
    tokens = torch.randint(1, 64, (count, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    return SequenceBatch.from_sequences([t[:2] for t in tokens], [t[2:] for t in tokens], list(range(count)), 0)


def main() -> None:
    torch.set_num_threads(1)
    model = policy()
    plan = KernelOptions(memory_budget=BUDGET).plan(model, SEQUENCES, SEQUENCES, PassSettings(256))
    train, evaluation = batch(2 * plan.tile, 1), batch(EVALUATION, 2)
    setup = KernelSetup(RowPasses(model, tuple(trainable_parameters(model)), PassSettings(256)), train, plan)
    found = Kernel(KernelEngine(setup).prepare(), None).contract(
        "evaluation", evaluation, {"score": score_coefficients(evaluation)}, ("score",)
    )
    assert found is not None
    few = [0, plan.tile - 1, plan.tile, 2 * plan.tile - 1]
    exact = compute_cross_fisher_kernel(model, evaluation.select([0, 1]), train.select(few), passes=PassSettings(256))
    print(
        json.dumps(
            {
                "plan": plan.to_json(),
                "parameters": sum(p.numel() for p in trainable_parameters(model).values()),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "error": float((found.kernel["score"][:2][:, few] - exact).norm() / exact.norm()),
            }
        )
    )


if __name__ == "__main__":
    main()
