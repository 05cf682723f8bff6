"""How soon the running check of the sampler tells another sampler, and how often it is alarmed without reason.

    python benchmarks/sampler_check_power.py [--sequences 64]

Contexts are those of completions that SmolLM2-135M draws on the demo's prompts; at each, tokens are drawn over and over from the
softmax and from samplers that alter it, and runs of steps are put together from them: 16 sequences a look, as a run watches. A
schedule says at which steps there is a look. The table goes to benchmarks/results/sampler_check_power.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from entropy_core.batch import length_buckets
from entropy_core.passes.forward import completion_logits, evaluation_mode
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.models.load import load_model_and_tokenizer
from rl_training.probe.surprisal import FALSE_ALARMS, TIGHTEST
from rl_training.sampling import draw, make_sampling_config
from rl_training.tasks.task import load_task

RESULT = Path(__file__).parent / "results" / "sampler_check_power.md"
CONFIG = Path(__file__).parents[1] / "rl_training" / "cfg" / "testconfig.yaml"
SEQUENCES, STEPS, RUNS, DRAWS = 16, 20, 1000, 400
LONG_RUN, LONG_RUNS = 500, 2000

SCHEDULES = {
    "steps 1, 2, 4, 8, 16 (`fresh`, `previous_step`; until now all)": [1, 2, 4, 8, 16],
    "every second step (`default`)": list(range(1, STEPS + 1, 2)),
    "every step (`accurate`)": list(range(1, STEPS + 1)),
}


def top_p(logits: Tensor, kept: float) -> Tensor:
    values, order = logits.sort(1, descending=True)
    before = values.softmax(1).cumsum(1) - values.softmax(1)
    return logits.scatter(1, order, values.masked_fill(before >= kept, -math.inf))


def top_k(logits: Tensor, kept: int) -> Tensor:
    return logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -math.inf)


def penalised(logits: Tensor, seen: list[Tensor], penalty: float) -> Tensor:
    out = logits.clone()
    for row, tokens in enumerate(seen):
        values = out[row, tokens]
        out[row, tokens] = torch.where(values > 0, values / penalty, values * penalty)
    return out


def samplers(seen: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "the softmax itself": lambda z: z,
        "temperature 0.9": lambda z: z / 0.9,
        "temperature 1.1": lambda z: z / 1.1,
        "top-p 0.95": lambda z: top_p(z, 0.95),
        "top-k 50": lambda z: top_k(z, 50),
        "repetition penalty 1.1": lambda z: penalised(z, seen, 1.1),
        "repetition penalty 1.3": lambda z: penalised(z, seen, 1.3),
    }


def contexts(sequences: int) -> tuple[Tensor, list[Tensor], float]:
    """(m, V) logits at drawn tokens, what stood before each, and the mean length of a completion."""
    config = load_config(TrainConfig, CONFIG)
    task = load_task(config.task)
    model, tokenizer = load_model_and_tokenizer(config.model.name, config.model.dtype, "cpu")
    sampling_config = make_sampling_config(
        model, tokenizer, config.rollouts.temperature, config.rollouts.max_completion_length
    )
    batch = draw(model, tokenizer, task.train[:sequences], 1, sampling_config, 0, "").to_batch(sampling_config)
    logits, seen = [], []
    with torch.no_grad(), evaluation_mode(model):
        for bucket in length_buckets(batch):
            logits.append(completion_logits(model, bucket, sampling_config.temperature))
            for row, column in zip(bucket.sequences.tolist(), bucket.columns.tolist(), strict=True):
                seen.append(batch.input_ids[row, :column][batch.attention_mask[row, :column].bool()].unique())
    return torch.cat(logits), seen, float(batch.completion_lengths.double().mean())


def terms(logits: Tensor, sampler: Callable[[Tensor], Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(m, DRAWS) x = surprisal - entropy of tokens of this sampler, and x^2 / 3 + 2 Var / 3."""
    x, v = [], []
    for part in logits.double().split(64):
        logp = part.log_softmax(1)
        entropy = -(logp.exp() * logp).sum(1, keepdim=True)
        variance = (logp.exp() * (logp + entropy).square()).sum(1, keepdim=True)
        drawn = sampler(part).softmax(1).multinomial(DRAWS, replacement=True, generator=generator)
        x.append(-logp.gather(1, drawn) - entropy)
        v.append(x[-1].square() / 3 + 2 * variance / 3)
    return torch.cat(x), torch.cat(v)


def alarms(x: Tensor, v: Tensor, tokens: int, runs: int, looks: int, generator: torch.Generator) -> Tensor:
    """(runs,) the first look that is alarmed, counted from 1; 0 for none. tokens: of one look."""
    difference, variance = torch.zeros(runs, dtype=torch.float64), torch.zeros(runs, dtype=torch.float64)
    first = torch.zeros(runs, dtype=torch.long)
    flat_x, flat_v = x.flatten(), v.flatten()
    for look in range(1, looks + 1):
        at = torch.randint(len(flat_x), (runs, tokens), generator=generator)
        difference, variance = difference + flat_x[at].sum(1), variance + flat_v[at].sum(1)
        whole = variance + TIGHTEST
        limit = (whole * ((whole / TIGHTEST).log() + 2 * math.log(1 / FALSE_ALARMS))).sqrt()
        first = torch.where((first == 0) & (difference.abs() >= limit), look, first)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    logits, seen, length = contexts(parser.parse_args().sequences)
    generator = torch.Generator().manual_seed(0)
    tokens = round(SEQUENCES * length)
    lines = [
        "# What the running check of the sampler finds, and how soon",
        "",
        f"`python benchmarks/sampler_check_power.py`: {len(logits)} contexts of SmolLM2-135M on the demo's prompts, {length:.1f} "
        f"tokens a completion, {SEQUENCES} sequences a look, {RUNS} runs of {STEPS} steps each. In per cent: runs that are told "
        "within these steps; behind it the median step at which they are.",
        "",
        "| sampler | " + " | ".join(SCHEDULES) + " |",
        "|---|" + "---|" * len(SCHEDULES),
    ]
    table = {}
    for name, sampler in samplers(seen).items():
        if name.startswith("repetition"):  # goes by what stood before each token: all at once
            altered = sampler(logits)
            pieces = iter(altered.double().split(64))
            table[name] = terms(logits, lambda part, pieces=pieces: next(pieces), generator)
        else:
            table[name] = terms(logits, sampler, generator)
        cells = []
        for steps in SCHEDULES.values():
            first = alarms(*table[name], tokens, RUNS, len(steps), generator)
            told = first[first > 0]
            when = f" (step {steps[int(told.double().median()) - 1]})" if len(told) else ""
            cells.append(f"{len(told) / RUNS:.1%}{when}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    false = int((alarms(*table["the softmax itself"], tokens, LONG_RUNS, LONG_RUN, generator) > 0).sum())
    lines += [
        "",
        f"False alarms in {LONG_RUNS} runs of {LONG_RUN} looks each at the softmax itself: {false} ({false / LONG_RUNS:.2%}; "
        f"the bound is {FALSE_ALARMS:.2%} of runs of any length).",
    ]
    print("\n".join(lines))
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
