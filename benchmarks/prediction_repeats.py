"""How often does the predicted change of the next step agree with the measured one? Ten repeats with fresh batches.

    python benchmarks/prediction_repeats.py runs/collapse/checkpoint-16 [repeats]

Each repeat draws both buffers anew (64 and 64 sequences, another seed), takes AdamW's step with the training buffer's gradient
from the checkpoint, predicts its change of entropy on the evaluation buffer (Rao-Blackwell, from the derivatives of the
tokens' log-probabilities and entropies along the step) and measures it on the same tokens by reweighting. They agree where
they differ by at most two standard errors, the two errors in quadrature; the stricter line takes the error of the
difference, a jackknife over prompts of both at once. Results: benchmarks/results/prediction_repeats.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work leave the cores to others

import torch

from entropy_core.batch import Bucket, SequenceBatch
from entropy_core.entropy import TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.fold_gradients import fold_gradients, shared_statistics
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import TokenStatistics
from entropy_core.shared_prefix import common_prefix_buckets, shared_prefix_buckets
from entropy_core.uncertainty import jackknife_over_prompts, jackknife_standard_error
from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import draw_buffers
from entropy_experiments.optimizer_step import moved, take_next_step
from entropy_experiments.sampling_plan import plan_sampling
from rl_training.configuration import load_config

RESULT = Path("benchmarks/results/prediction_repeats.md")


def short_rows(batch: SequenceBatch) -> list[Bucket]:
    return common_prefix_buckets(batch, tokens_per_row=256)


def loss_gradient(checkpoint: Checkpoint, batch: SequenceBatch, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    def minus_weighted_scores(_: TokenStatistics) -> list[TokenCoefficients]:
        return [score_coefficients(batch, -weights * len(batch))]

    found, _ = fold_gradients(checkpoint.model, batch, minus_weighted_scores, shared_prefix_buckets, folds=1)
    return found[0].total()


def error_of_difference(
    before: TokenStatistics, after: TokenStatistics, parts: torch.Tensor, batch: SequenceBatch
) -> float:
    """Jackknife over prompts of prediction minus measurement, prompts (one sequence each) left out of both."""
    differences = []
    for left in range(len(batch)):
        keep = [n for n in range(len(batch)) if n != left]
        part = batch.select(keep)
        pair = (TokenStatistics(s.logprobs[keep], s.entropies[keep]) for s in (before, after))
        differences.append(float(parts[keep].mean()) - snis_entropy_change(*pair, part).change)
    return jackknife_standard_error(torch.tensor(differences, dtype=torch.float64))


def repeat(checkpoint: Checkpoint, seed: int) -> dict[str, float]:
    config = load_config(FisherAnalysisConfig, None, [f"seed={seed}"])
    plan = plan_sampling(checkpoint, config)
    evaluation, training = draw_buffers(checkpoint, plan, config, lambda stage: None)
    model, batch = checkpoint.model, evaluation.to_batch(plan.law)
    gradient = loss_gradient(checkpoint, training.rollouts.to_batch(plan.law), training.weights)
    assert checkpoint.optimizer is not None
    step = take_next_step(model, checkpoint.optimizer, gradient, 1.0, None)
    before = shared_statistics(model, batch, short_rows)
    along = {}
    for scale in (1 / 16, -1 / 16, 1.0):
        with moved(model, step.taken, scale):
            along[scale] = shared_statistics(model, batch, short_rows)
    c = entropy_coefficients(before, batch, "rao_blackwell")
    ahead, behind = along[1 / 16], along[-1 / 16]
    parts = 8 * (
        c.entropy * (ahead.entropies.double() - behind.entropies.double())
        + c.logprob * (ahead.logprobs.double() - behind.logprobs.double())
    ).sum(1)
    measured = snis_entropy_change(before, along[1.0], batch)
    return {
        "predicted": float(parts.mean()),
        "predicted_se": jackknife_over_prompts(parts, batch.prompt_index),
        "measured": measured.change,
        "measured_se": measured.standard_error,
        "difference_se": error_of_difference(before, along[1.0], parts, batch),
        "ess": measured.effective_sample_size,
    }


def main(path: str, repeats: int = 10) -> None:
    checkpoint = load_checkpoint(path)
    lines = [
        "# Predicted against measured, with fresh batches",
        "",
        f"`python benchmarks/prediction_repeats.py <run>/{Path(path).name} {repeats}`; {checkpoint.record.model_name}, step "
        f"{checkpoint.record.step}, 64 evaluation and 64 training sequences, nats per token. *agree*: within two standard "
        "errors, in quadrature; *paired*: within two of the difference's own, which shares the tokens and is much smaller.",
        "",
        "| seed | predicted | measured | ESS | agree | paired |",
        "|---|---|---|---|---|---|",
    ]
    agreed = paired = 0
    for seed in range(1, repeats + 1):
        r = repeat(checkpoint, seed)
        difference = abs(r["predicted"] - r["measured"])
        within = difference <= 2 * (r["predicted_se"] ** 2 + r["measured_se"] ** 2) ** 0.5
        strict = difference <= 2 * r["difference_se"]
        agreed, paired = agreed + within, paired + strict
        lines.append(
            f"| {seed} | {r['predicted']:+.4f} ± {r['predicted_se']:.4f} | {r['measured']:+.4f} ± {r['measured_se']:.4f} | "
            f"{r['ess']:.0f} | {'yes' if within else 'no'} | {'yes' if strict else 'no'} ({r['difference_se']:.4f}) |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"They agree in {agreed} of {repeats} repeats; by the paired error in {paired}."]
    RESULT.write_text("\n".join(lines) + "\n")
    print(lines[-1])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
