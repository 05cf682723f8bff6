"""How often does the predicted change of the next step agree with the measured one? Ten repeats with fresh batches.

    python benchmarks/prediction_repeats.py runs/collapse/checkpoint-16 [repeats]

Each repeat draws both buffers anew (64 and 64 sequences, another seed), takes AdamW's step with the training buffer's gradient
from the checkpoint, predicts its change of entropy on the evaluation buffer (Rao-Blackwell, from the derivatives of the
tokens' log-probabilities and entropies along the step) and measures it on the same tokens by reweighting. They agree where 0 lies
in the 95% interval of the difference, a jackknife over prompts of both at once
(entropy_experiments.statistics.agreement). Results: benchmarks/results/prediction_repeats.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work leave the cores to others

import torch

from entropy_core.batch import Bucket, SequenceBatch
from entropy_core.directional import entropy_derivatives, weights_moved
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.fold_gradients import fold_gradients, shared_statistics
from entropy_core.measurement import EntropyMeasurement, snis_entropy_change
from entropy_core.passes.shared_prefix import common_prefix_buckets, shared_prefix_buckets
from entropy_core.scores import TokenStatistics
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import draw_buffers
from entropy_experiments.run.reporter import SILENT
from entropy_experiments.statistics.agreement import Agreement, paired_agreement
from entropy_experiments.step.optimizer_step import take_next_step
from rl_training.configuration import load_config

RESULT = Path("benchmarks/results/prediction_repeats.md")


def short_rows(batch: SequenceBatch) -> list[Bucket]:
    return common_prefix_buckets(batch, tokens_per_row=256)


def loss_gradient(checkpoint: Checkpoint, batch: SequenceBatch, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    def minus_weighted_scores(_: TokenStatistics) -> list[TokenCoefficients]:
        return [score_coefficients(batch, -weights * len(batch))]

    found, _ = fold_gradients(checkpoint.model, batch, minus_weighted_scores, shared_prefix_buckets, folds=1)
    return found[0].total()


def without_each_prompt(
    before: TokenStatistics, after: TokenStatistics, along: TokenStatistics, batch: SequenceBatch
) -> list[float]:
    """Prediction minus measurement with each prompt (one sequence each) left out of both."""
    differences = []
    for left in range(len(batch)):
        keep = torch.tensor([n for n in range(len(batch)) if n != left])
        part, first, last = batch.select(keep), before.select(keep), after.select(keep)
        predicted = float(entropy_derivatives(first, along.select(keep), part).mean())
        differences.append(predicted - snis_entropy_change(first, last, part).change)
    return differences


def repeat(checkpoint: Checkpoint, seed: int) -> tuple[float, EntropyMeasurement, Agreement]:
    config = load_config(FisherAnalysisConfig, None, [f"seed={seed}"])
    plan = plan_sampling(checkpoint, config)
    evaluation, training = draw_buffers(checkpoint, plan, config, SILENT)
    model, batch = checkpoint.model, evaluation.to_batch(plan.sampling_config)
    gradient = loss_gradient(checkpoint, training.rollouts.to_batch(plan.sampling_config), training.weights)
    assert checkpoint.optimizer is not None
    step = take_next_step(model, checkpoint.optimizer, gradient, 1.0, None)
    before = shared_statistics(model, batch, short_rows)
    along = {}
    for scale in (1 / 16, -1 / 16, 1.0):
        with weights_moved(model, step.parameter_delta, scale):
            along[scale] = shared_statistics(model, batch, short_rows)
    ahead, behind = along[1 / 16], along[-1 / 16]
    slopes = TokenStatistics(
        8 * (ahead.logprobs.double() - behind.logprobs.double()),
        8 * (ahead.entropies.double() - behind.entropies.double()),
    )
    predicted = float(entropy_derivatives(before, slopes, batch).mean())
    measured = snis_entropy_change(before, along[1.0], batch)
    compared = paired_agreement(predicted - measured.change, without_each_prompt(before, along[1.0], slopes, batch))
    assert compared is not None
    return predicted, measured, compared


def main(path: str, repeats: int = 10) -> None:
    checkpoint = load_checkpoint(path)
    lines = [
        "# Predicted against measured, with fresh batches",
        "",
        f"`python benchmarks/prediction_repeats.py <run>/{Path(path).name} {repeats}`; {checkpoint.record.model_name}, step "
        f"{checkpoint.record.step}, 64 evaluation and 64 training sequences, nats per token. *agree*: 0 lies in the 95% interval "
        "of the difference, a jackknife over prompts of both sides at once.",
        "",
        "| seed | predicted | measured | ESS | difference, 95% interval | agree |",
        "|---|---|---|---|---|---|",
    ]
    agreed = 0
    for seed in range(1, repeats + 1):
        predicted, measured, compared = repeat(checkpoint, seed)
        agreed += compared.agrees
        lines.append(
            f"| {seed} | {predicted:+.4f} | {measured.change:+.4f} ± {measured.standard_error:.4f} | "
            f"{measured.effective_sample_size:.0f} | {compared.difference:+.4f} ({compared.low:+.4f} to {compared.high:+.4f}) | "
            f"{'yes' if compared.agrees else 'no'} |"
        )
        print(lines[-1], flush=True)
    lines += ["", f"They agree in {agreed} of {repeats} repeats."]
    RESULT.write_text("\n".join(lines) + "\n")
    print(lines[-1])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
