"""Does the training side's own noise cover? Buffers drawn again and again in an exact world, a real AdamW's step for each.

    python -m benchmarks.calibration_training [buffers]          default 400; results: benchmarks/results/calibration/training.*

Every buffer is drawn as a trainer draws it: prompts uniformly, completions from the policy, a reward, Dr. GRPO's weights. The
moments are those that earlier buffers left in torch's own AdamW; the next step is clipped and taken from them. What it does to
entropy to first order is known exactly for every buffer (gradient of entropy by enumeration), so that

    coverage            how often the 95% interval of one buffer (training_noise) holds the mean over all buffers
    next draw           how often value +- t sqrt(2) standard errors holds what another buffer does
    size of the error   root mean square of the standard errors over the true spread between buffers
    effect, share       the slope of real steps without a sequence on r_i and on its accounting share: 1 where a number says what
                        leaving the sequence out does
    prompts             the same without a whole prompt, on the sum of its sequences' r_i
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.calibration_world import Shape, World
from entropy_core.adamw import batch_step_factor, read_adamw_state
from entropy_core.gradients import per_sequence_gradients, trainable_parameters
from entropy_core.weighting import sequence_weights
from entropy_experiments.statistics.agreement import t_quantile
from entropy_experiments.step.effects_of_leaving_out import effects_of_leaving_out
from entropy_experiments.step.gradient_rows import KeptRows
from entropy_experiments.step.optimizer_step import take_next_step
from entropy_experiments.step.training_noise import step_change, training_noise

RESULTS = Path("benchmarks/results/calibration")
LEARNING_RATE, SEQUENCES_LEFT_OUT = 1e-3, 2


@dataclass(frozen=True)
class Setting:
    """earlier: steps that the optimizer has seen; max_norm: of clipping, in units of a typical gradient's norm; None without."""

    name: str
    shape: Shape
    earlier: int
    max_norm: float | None = None


SETTINGS = (
    Setting("8 prompts x 6, second step", Shape("", 8, (6, 6), 0.0), 1),
    Setting("8 prompts x 6, step 4", Shape("", 8, (6, 6), 0.0), 3),
    Setting("8 prompts x 6, step 4, clipped", Shape("", 8, (6, 6), 0.0), 3, 0.5),
    Setting("8 prompts x 6, step 40", Shape("", 8, (6, 6), 0.0), 39),
    Setting("16 prompts x 4, step 8", Shape("", 16, (4, 4), 0.0), 7),
    Setting("16 prompts x 2 to 8, step 8", Shape("", 16, (2, 8), 0.0), 7),
    Setting("64 prompts x 4, step 8", Shape("", 64, (4, 4), 0.0), 7),
)


class Trainer:
    """Buffers of a world and the optimizer that they train; rows of all completions are formed once."""

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world, self.model = world, world.policy
        self.parameters = trainable_parameters(self.model)
        self.rows = per_sequence_gradients(self.model, world.batch)
        flat = world.exact.token_entropy_gradient
        sizes = [p.numel() for p in self.parameters.values()]
        pieces = zip(self.parameters.items(), flat.split(sizes), strict=True)
        self.gradient_of_h = {name: piece.view_as(p) for (name, p), piece in pieces}
        # A reward that the policy earns now and then, of each completion for good.
        generator = torch.Generator().manual_seed(seed)
        self.rewards = (torch.rand(len(world.batch), generator=generator) < 0.4).double()

    def buffer(self, shape: Shape, generator: torch.Generator) -> tuple[KeptRows, Tensor, Tensor]:
        """(rows, weights, prompts) of one buffer."""
        chosen, prompts = self.world.draw(shape, generator)
        lengths = self.world.batch.completion_lengths[chosen]
        weights = sequence_weights(self.rewards[chosen], prompts, lengths, "dr_grpo", 4, "constant")
        return KeptRows({name: rows[chosen] for name, rows in self.rows.items()}), weights, prompts

    def settle(self, setting: Setting, generator: torch.Generator) -> tuple[torch.optim.AdamW, float | None]:
        """An optimizer that has seen earlier buffers' gradients, clipped; the policy stays where it is."""
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE)
        norms, before = [], {name: p.detach().clone() for name, p in self.parameters.items()}
        for _ in range(setting.earlier):
            rows, weights, _ = self.buffer(setting.shape, generator)
            gradient = rows.weighted_gradient(weights)
            for name, p in self.parameters.items():
                p.grad = gradient[name].clone()
            norms.append(float(torch.stack([g.norm() for g in gradient.values()]).norm()))
            if setting.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), setting.max_norm * float(np.median(norms)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(before[name])
        return optimizer, None if setting.max_norm is None else setting.max_norm * float(np.median(norms))


def simulate(trainer: Trainer, setting: Setting, buffers: int, seed: int = 1) -> dict[str, float]:
    """Name of a check -> its rate or slope over simulated buffers, all from the same moments."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, max_norm = trainer.settle(setting, generator)
    state = read_adamw_state(optimizer, trainer.parameters)
    change = step_change(trainer.gradient_of_h, state, trainer.parameters, max_norm)
    found, left_out = [], []
    for number in range(buffers):
        rows, weights, prompts = trainer.buffer(setting.shape, generator)
        gradient = rows.weighted_gradient(weights)
        noise = training_noise(change, gradient, lambda some, r=rows, w=weights: r.gradient_of(some, w), prompts)
        assert noise is not None
        found.append(noise)
        if number < buffers // 10:
            left_out.append(_without(trainer, optimizer, max_norm, rows, weights, prompts, noise.prompt_effects))
    values, errors = (np.array([getattr(n, name) for n in found]) for name in ("value", "standard_error"))
    told = [n.to_json() for n in found]
    mean, reach = values.mean(), t_quantile(found[0].groups - 1) * np.sqrt(2)
    sequences, prompts_of = (np.concatenate([one[k] for one in left_out], 1) for k in (0, 1))
    rates = {
        "coverage of the 95% interval": float(np.mean([t["low"] <= mean <= t["high"] for t in told])),
        "the next draw in the interval": float(np.mean(np.abs(values[1:] - values[:-1]) <= reach * errors[:-1])),
        "rms error / true spread": float(np.sqrt(np.square(errors).mean()) / values.std(ddof=1)),
        "without a sequence: slope on its effect": _slope(sequences[0], sequences[2]),
        "without a sequence: slope on its accounting share": _slope(sequences[1], sequences[2]),
    }
    if prompts_of.size:
        rates["without a prompt: slope on its effects' sum"] = _slope(*prompts_of)
    return rates


def _without(
    trainer: Trainer, optimizer: torch.optim.AdamW, max_norm: float | None, rows: KeptRows, weights: Tensor, prompts: Tensor,
    prompt_effects: Tensor | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """((3, k) effects, shares and real differences of single sequences; (2, B) sums of effects and real ones of prompts)."""

    def real(some: Tensor) -> float:
        taken = take_next_step(trainer.model, optimizer, rows.weighted_gradient(some), max_norm).parameter_delta
        return sum(float((trainer.gradient_of_h[name] * d).sum()) for name, d in taken.items())

    gradient = rows.weighted_gradient(weights)
    step = take_next_step(trainer.model, optimizer, gradient, max_norm)
    effects = effects_of_leaving_out(trainer.gradient_of_h, gradient, rows, weights, step)
    held = {
        name: batch_step_factor(step.state[name]) * step.step_preconditioner[name] * g
        for name, g in trainer.gradient_of_h.items()
    }
    shares = step.clip * weights * rows.products(held)
    whole, differences = real(weights), []
    chosen = torch.argsort(shares.abs(), descending=True)[:SEQUENCES_LEFT_OUT].tolist() + [0, len(weights) // 2]
    for i in chosen:
        without = weights.clone()
        without[i] = 0
        differences.append(whole - real(without))
    single = np.array([effects[chosen].tolist(), shares[chosen].tolist(), differences])
    if prompt_effects is None:
        return single, np.zeros((2, 0))
    sums = torch.zeros(len(prompt_effects), dtype=torch.float64).index_add_(0, prompts, effects)
    return single, np.stack([sums.numpy(), prompt_effects.numpy()])


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / (x @ x))


def main(buffers: int = 400) -> None:
    trainer, table = Trainer(World()), {}
    for setting in SETTINGS:
        table[setting.name] = simulate(trainer, setting, buffers)
        print(setting.name, {name: round(rate, 3) for name, rate in table[setting.name].items()}, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "training.json").write_text(json.dumps({"buffers": buffers, "settings": table}, indent=1) + "\n")
    names = list(next(iter(table.values())))
    lines = [
        "# The training side's own noise, in an exact world",
        "",
        f"`python -m benchmarks.calibration_training {buffers}`: {buffers} buffers a line, each with the AdamW step that it "
        "causes from the same moments. What the columns mean stands at the head of that file.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for setting, rates in table.items():
        cells = [
            "–" if name not in rates else f"{rates[name]:.1%}" if k < 2 else f"{rates[name]:.2f}"
            for k, name in enumerate(names)
        ]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    (RESULTS / "training.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
