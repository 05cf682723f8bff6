"""`analyze --dry-run`: bytes, passes and seconds of every stage of an analysis, before any of them
runs.

A pilot of a few sequences is drawn from the checkpoint and timed
(entropy_experiments.forecast.pilot). Seconds of a stage are the pilot's rates times the sequences
of the stage; how many these are, the configuration says, the run's record of rejected groups, and
the plan of the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_core.batch import ENOUGH_TOKENS
from entropy_core.interventions import MOST_INTERVENTIONS, TOKEN_GRADIENTS
from entropy_core.passes.forward import input_device
from entropy_core.passes.settings import PassSettings
from entropy_experiments.analyses.candidate_weights import MOST_ROWS
from entropy_experiments.buffers.recorded_task import check_trust
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_as_configured
from entropy_experiments.config import FisherAnalysisConfig, FisherKernelConfig
from entropy_experiments.forecast.pilot import Pilot, buffers_without_drawing, run_pilot
from entropy_experiments.kernel.contraction import ROW_KINDS, STEP_VECTORS
from entropy_experiments.kernel.factor_sizes import Lengths
from entropy_experiments.kernel.options import LOGIT_BYTES, describe_plan, held_memory, kernel_options
from entropy_experiments.kernel.plan import KernelPlan, fixed_bytes
from entropy_experiments.step.row_products import rows_are_large
from rl_training.errors import UserError

_GIB = 2**30
# Memory that glibc's allocator takes for a graph, over what the graph keeps: 1.4 to 1.9 were seen
# (holes between tensors).
_ALLOCATOR = 1.6


@dataclass(frozen=True)
class StageForecast:
    """What one stage will take.

    Attributes:
        passes: sequences through the model (forward, with or without backward).
    """

    name: str
    passes: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What an analysis will take.

    Attributes:
        memory: the process's peak, bytes.
        disk: the gradient store and the results' kernels, bytes.
        rows: "hooks" or "loop", and why the latter.
    """

    plan: KernelPlan
    stages: list[StageForecast]
    memory: int
    disk: int
    parameters: int
    n_train: int
    rows: Mapping[str, str | None]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        stages = [{"name": s.name, "passes": s.passes, "seconds": round(s.seconds, 3)} for s in self.stages]
        return {
            "plan": self.plan.to_json(),
            "rows": dict(self.rows),
            "parameters": self.parameters,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "seconds": round(self.seconds, 3),
            "stages": stages,
        }

    def lines(self) -> list[str]:
        """A table to print."""
        out = [describe_plan(self.plan, self.n_train)]
        if self.rows["method"] == "loop":
            out.append(f"gradients by one pass per sequence: {self.rows['reason']}")
        out.append(f"{'stage':<44} {'passes':>9} {'seconds':>9}")
        out += [f"{s.name:<44} {s.passes or '':>9} {s.seconds:>9.1f}" for s in self.stages]
        out.append(f"{'in all':<44} {sum(s.passes for s in self.stages):>9} {self.seconds:>9.1f}")
        out.append(f"peak memory {self.memory / _GIB:.2f} GiB, on disk {self.disk / _GIB:.3f} GiB")
        return out


def forecast_analysis(checkpoint_path: str | Path, config: FisherAnalysisConfig, trust: bool = False) -> Forecast:
    """Load the checkpoint, time a pilot, and say what the analysis will take. Nothing is written.

    Args:
        trust: as in the analysis.

    Raises:
        UserError: bad input, as the analysis would.
    """
    if config.checkpoint.sharding is not None:
        raise UserError(
            "a model that checkpoint.sharding cuts over processes is planned on paper: add --devices N, or leave it out"
        )
    check_trust(checkpoint_path, config, trust)
    begun, settings = time.perf_counter(), config.entropy_analysis
    checkpoint = load_as_configured(checkpoint_path, config)
    loading = time.perf_counter() - begun
    sampling_plan = plan_sampling(checkpoint, config, trust)
    options = kernel_options(settings.fisher_kernel)
    model, passes = checkpoint.model, PassSettings(settings.fisher_kernel.token_batch_size)
    given = buffers_without_drawing(checkpoint, sampling_plan, config)
    n_eval = settings.eval_batch_size if given.evaluation is None else len(given.evaluation)
    n_train = settings.train_batch_size if given.training is None else len(given.training)
    held = held_memory(model)
    pilot = run_pilot(checkpoint, sampling_plan, config, given)
    on_cpu = input_device(model).type == "cpu"
    tokens = min(max(n_eval * pilot.evaluation.tokens, n_train * pilot.training.tokens), passes.token_batch_size)
    if on_cpu:  # as entropy_core.batch.length_buckets cuts passes with gradients: a group is not torn apart
        tokens = min(tokens, ENOUGH_TOKENS + sampling_plan.completions_per_prompt * pilot.training.tokens)
    full, kinds = settings.fisher_kernel.compute_full, len(ROW_KINDS)
    lengths = _lengths(pilot, int(tokens))
    plan = options.plan(model, n_eval, n_train, passes, full, kinds, lengths)
    size = options.size(model, n_eval, n_train, kinds, lengths if full else None)
    drawn = pilot.drawing.seconds(n_eval) if given.evaluation is None else 0.0
    loaded = [
        StageForecast("loading the checkpoint", 0, loading),
        StageForecast(
            "drawing the training buffer", 0, _training_drawing(config, pilot) if given.training is None else 0.0
        ),
        StageForecast("drawing the evaluation buffer", 0, drawn),
    ]
    stages = [*loaded, *_stages(config, plan, pilot, n_eval, n_train, rows_are_large(model))]
    one_pass = (_ALLOCATOR if on_cpu else 1.0) * pilot.pass_bytes * tokens + LOGIT_BYTES
    memory = held + fixed_bytes(size, plan.strategy) + plan.memory + int(one_pass)
    kernels = 4 * 2 * (size.n_eval * size.n_train + size.n_train**2) if settings.fisher_kernel.compute_full else 0
    return Forecast(plan, stages, memory, plan.disk + kernels, size.parameters, size.n_train, pilot.rows.to_json())


def _lengths(pilot: Pilot, a_pass: int) -> Lengths:
    """Of the training side's sequences, as the pilot found them."""
    drawn = pilot.drawing.lengths
    predicted, most = sum(drawn) / len(drawn), max(drawn)
    tokens = pilot.training.tokens
    return Lengths(tokens, min(predicted, tokens), int(tokens + max(0.0, most - predicted)), most, a_pass)


def _training_drawing(config: FisherAnalysisConfig, pilot: Pilot) -> float:
    """Seconds, with the rounds in which groups without gradient are drawn anew."""
    settings = config.entropy_analysis
    more = 0 if settings.sampling.train_prompts == "fixed_set" else settings.sampling.max_refill_rounds
    missing = (settings.train_batch_size * (1 - pilot.kept) ** number for number in range(1 + more))
    return sum(pilot.drawing.seconds(n) for n in missing)


def _of_gradients(
    kernel: FisherKernelConfig, plan: KernelPlan, pilot: Pilot, n_eval: int, n_train: int
) -> list[StageForecast]:
    """From the training side's gradients to the kernels, or to the predictions where no row is formed."""
    training, evaluation = pilot.training, pilot.evaluation

    def passes(name: str, sequences: int, backwards: int) -> StageForecast:
        return StageForecast(name, sequences, evaluation.seconds(sequences, backwards))

    if plan.strategy == "directions":
        along = len(STEP_VECTORS) * n_eval * evaluation.derivatives + 3 * n_train * training.derivatives
        return [
            StageForecast(
                "gradient of the training loss",
                2 * n_train,
                training.seconds(n_train, 1) + training.seconds(n_train, 0),
            ),
            passes("token statistics", n_eval, 0),
            StageForecast(
                "predictions, along the step and its parts",
                (len(STEP_VECTORS) + 1) * n_eval + 3 * n_train,
                along + evaluation.seconds(n_eval, 2),
            ),
        ]
    tiles = -(-n_train // plan.tile) if plan.strategy == "tiles" else 1
    # Of factors rows are formed anew for each chunk, a row at the price of a backward pass (as many operations).
    chunks = [-(-n // plan.chunk) if plan.strategy == "factored" else 0 for n in (n_eval, n_train)]
    out = []
    # rows (formed once more for every tile), the gradient by autograd as a check, and the training
    # side's statistics
    formed = n_train if plan.strategy != "tiles" else 32
    checked = n_train if plan.strategy == "memory" else 32
    seconds = training.seconds(formed + checked, 1) + training.seconds(n_train, 0)
    out.append(StageForecast("training gradients, one row per sequence", formed + checked + n_train, seconds))
    out.append(passes("token statistics", n_eval, 0))
    anew = n_train if plan.strategy == "tiles" else 0
    seconds = (
        evaluation.seconds(n_eval * tiles, 4) + training.seconds(anew, 1) + chunks[0] * n_train * training.backward
    )
    out.append(StageForecast("evaluation gradients and kernels", n_eval * tiles + anew, seconds))
    if kernel.save_gradients:
        out.append(passes("storing the evaluation gradients", n_eval, 2))
    if kernel.compute_full:
        # and the gradients of entropy that shares rest on, from one more pass over the evaluation
        # side
        seconds = training.seconds(n_train * tiles, 2) + training.seconds(anew, 1) + evaluation.seconds(n_eval, 2)
        seconds += chunks[1] * n_train * training.backward
        out.append(StageForecast("the training buffer's own kernel", n_train * tiles + anew + n_eval, seconds))
        out.append(passes("checking the kernel against finite differences", 2 * min(16, n_eval), 0))
    return out


def _stages(
    config: FisherAnalysisConfig, plan: KernelPlan, pilot: Pilot, n_eval: int, n_train: int, large: bool
) -> list[StageForecast]:
    settings = config.entropy_analysis
    analysis, kernel = settings.analysis, settings.fisher_kernel
    training, evaluation, draw = pilot.training, pilot.evaluation, pilot.drawing.seconds

    def passes(name: str, sequences: int, backwards: int) -> StageForecast:
        return StageForecast(name, sequences, evaluation.seconds(sequences, backwards))

    out = _of_gradients(kernel, plan, pilot, n_eval, n_train)
    if analysis.entropy_prediction:
        out += [passes(f"measuring at {s:g} x the step", n_eval, 0) for s in sorted({*analysis.step_scales, 1.0})]
        out.append(passes("checking the slope", 2 * n_eval, 0))
        fresh = len(analysis.fresh_scales)
        drawn = fresh * draw(n_eval) + evaluation.seconds(fresh * n_eval, 0)
        out.append(StageForecast("analysis: entropy prediction", fresh * n_eval, drawn))
    if analysis.higher_order:  # back along the step; forth is measured above
        out.append(passes("analysis: higher order", n_eval * sum(s <= 1 for s in {*analysis.step_scales, 1.0}), 0))
    if plan.strategy != "memory":
        out.append(StageForecast("noise of the training side", n_train, training.seconds(n_train, 1)))
    if analysis.attribution and plan.strategy == "memory":  # otherwise the shares' own pass has the tokens'
        out.append(StageForecast("analysis: attribution", n_train, n_train * training.derivatives))
    if analysis.intervention:
        out.append(passes("analysis: intervention", (analysis.intervention_subsets + 16) * n_eval, 0))
    if analysis.weighting_schemes and (analysis.weighting_steps or not kernel.compute_full):
        count = (1 + MOST_ROWS) * n_eval if analysis.weighting_steps else 0
        seconds = evaluation.seconds(count, 0)
        if not kernel.compute_full:  # a gradient and a pass in forward mode for each
            count += MOST_ROWS * (n_eval + n_train)
            seconds += MOST_ROWS * (training.seconds(n_train, 1) + n_eval * evaluation.derivatives)
        out.append(StageForecast("analysis: weighting schemes", count, seconds))
    if analysis.prices:
        seconds, count = training.seconds(n_train, TOKEN_GRADIENTS) + evaluation.seconds(n_eval, 4), 1
        if large:  # a gradient and a pass in forward mode for each
            count = MOST_INTERVENTIONS
            seconds = count * (training.seconds(n_train, 1) + n_eval * evaluation.derivatives)
        if analysis.price_steps:
            seconds += MOST_INTERVENTIONS * evaluation.seconds(n_eval, 0)
        out.append(StageForecast("analysis: prices", count * (n_train + n_eval), seconds))
    return out
