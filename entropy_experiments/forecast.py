"""`analyze --dry-run`: bytes, passes and seconds of every stage of an analysis, before any of them runs.

A pilot of a few sequences is drawn from the checkpoint and timed: drawing, a forward pass, a forward pass with one backward
pass and rows, and with several. Seconds of a stage are the pilot's per token, times the tokens of the stage; tokens come from
the pilot's mean lengths, the run's record of rejected groups, and the plan of the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.gradients import stream_rows
from entropy_core.scores import token_statistics
from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import choose_evaluation_rows
from entropy_experiments.kernel_options import describe_plan, kernel_options, pass_bytes, used_memory
from entropy_experiments.kernel_plan import KernelPlan, fixed_bytes
from entropy_experiments.module_filter import chosen_parameters, only_trainable
from entropy_experiments.sampling_plan import SamplingPlan, plan_sampling
from rl_training.algs.rollout_record import read_rollouts
from rl_training.errors import UserError
from rl_training.sampling import draw

PILOT = 16  # sequences
_GIB = 2**30


@dataclass(frozen=True)
class StageForecast:
    """passes: sequences through the model (forward, with or without backward)."""

    name: str
    passes: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """memory: the process's peak, bytes; disk: the gradient store and the results' kernels, bytes."""

    plan: KernelPlan
    stages: list[StageForecast]
    memory: int
    disk: int
    parameters: int
    n_train: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        stages = [{"name": s.name, "passes": s.passes, "seconds": round(s.seconds, 3)} for s in self.stages]
        return {
            "plan": self.plan.to_json(),
            "parameters": self.parameters,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "seconds": round(self.seconds, 3),
            "stages": stages,
        }

    def lines(self) -> list[str]:
        """A table to print."""
        out = [describe_plan(self.plan, self.n_train), f"{'stage':<44} {'passes':>9} {'seconds':>9}"]
        out += [f"{s.name:<44} {s.passes or '':>9} {s.seconds:>9.1f}" for s in self.stages]
        out.append(f"{'in all':<44} {sum(s.passes for s in self.stages):>9} {self.seconds:>9.1f}")
        out.append(f"peak memory {self.memory / _GIB:.2f} GiB, on disk {self.disk / _GIB:.3f} GiB")
        return out


@dataclass(frozen=True)
class _Rates:
    """Seconds of the pilot: drawing a sequence; a token's forward pass without and with a graph, and each backward pass."""

    drawing: float
    forward: float
    with_graph: float
    backward: float
    tokens: float
    loading: float


def forecast_analysis(checkpoint_path: str | Path, config: FisherAnalysisConfig) -> Forecast:
    """Load the checkpoint, time a pilot, and say what the analysis will take. Nothing is written.

    Raises UserError for bad input, as the analysis would.
    """
    begun = time.perf_counter()
    settings = config.entropy_analysis
    checkpoint = load_checkpoint(
        checkpoint_path,
        config.checkpoint.model,
        config.checkpoint.device,
        config.checkpoint.dtype,
        require_optimizer=settings.fisher_kernel.preconditioning != "none",
    )
    loading = time.perf_counter() - begun
    sampling_plan = plan_sampling(checkpoint, config)
    options = kernel_options(settings.fisher_kernel)
    model, token_batch_size = checkpoint.model, settings.fisher_kernel.token_batch_size
    held = used_memory(next(model.parameters()).device)
    plan = options.plan(model, settings.eval_batch_size, settings.train_batch_size, token_batch_size)
    size = options.size(model, settings.eval_batch_size, settings.train_batch_size)
    rates = _pilot(checkpoint, sampling_plan, config, loading)
    stages = _stages(config, plan, rates, _drawn_per_kept(checkpoint))
    memory = held + fixed_bytes(size) + plan.memory + pass_bytes(model, token_batch_size)
    kernels = 4 * 2 * (size.n_eval * size.n_train + size.n_train**2) if settings.fisher_kernel.compute_full else 0
    return Forecast(plan, stages, memory, plan.disk + kernels, size.parameters, size.n_train)


def _drawn_per_kept(checkpoint: Checkpoint) -> float:
    """Sequences generated for each one kept, in the last step that the run recorded; 1 where there is no record."""
    try:
        rows = read_rollouts(checkpoint.record.run_dir, checkpoint.record.step)
    except UserError:
        return 1.0
    kept = sum(row["status"] != "rejected" for row in rows)
    return len(rows) / kept if kept else 1.0


def _pilot(checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, loading: float) -> _Rates:
    settings, model = config.entropy_analysis, checkpoint.model
    rows = choose_evaluation_rows(plan, config) or plan.task.train
    rows = (rows * PILOT)[: min(PILOT, max(settings.eval_batch_size, 2))]
    drawing, rollouts = _timed(lambda: draw(model, checkpoint.tokenizer, rows, 1, plan.law, config.seed + 7, "pilot"))
    batch = rollouts.to_batch(plan.law).to(next(model.parameters()).device)
    tokens = int(batch.attention_mask.sum())
    token_batch_size = settings.fisher_kernel.token_batch_size
    token_statistics(model, batch.select([0]), token_batch_size)  # first calls are slower
    forward, statistics = _timed(lambda: token_statistics(model, batch, token_batch_size))
    names = chosen_parameters(model, settings.fisher_kernel.filter_modules)
    one = [score_coefficients(batch)]
    four = [*one, entropy_coefficients(statistics, batch, "rao_blackwell")] * 2

    def rows_of(objectives: list[Any], of: SequenceBatch = batch) -> None:
        with only_trainable(model, names):
            stream_rows(model, of, objectives, lambda *_: None, token_batch_size, verify=False)

    single, _ = _timed(lambda: rows_of(one))
    several, _ = _timed(lambda: rows_of(four))
    backward = max((several - single) / (len(four) - 1), 0.2 * forward)
    with_graph = max(forward, single - backward)
    return _Rates(
        drawing / len(rows), forward / tokens, with_graph / tokens, backward / tokens, tokens / len(rows), loading
    )


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    with torch.enable_grad():
        found = work()
    return time.perf_counter() - begun, found


def _stages(
    config: FisherAnalysisConfig, plan: KernelPlan, rates: _Rates, drawn_per_kept: float
) -> list[StageForecast]:
    settings = config.entropy_analysis
    n_eval, n_train = settings.eval_batch_size, settings.train_batch_size
    analysis, kernel = settings.analysis, settings.fisher_kernel

    def passes(name: str, sequences: int, backwards: int) -> StageForecast:
        forward = rates.with_graph if backwards else rates.forward
        seconds = sequences * rates.tokens * (forward + backwards * rates.backward)
        return StageForecast(name, sequences, seconds)

    from_run = settings.sampling.train_prompts == "from_run"
    generated = 0 if from_run else n_train * drawn_per_kept
    tiles = -(-n_train // plan.tile) if plan.strategy == "tiles" else 1
    out = [
        StageForecast("loading the checkpoint", 0, rates.loading),
        StageForecast("drawing the training buffer", 0, generated * rates.drawing),
        StageForecast("drawing the evaluation buffer", 0, n_eval * rates.drawing),
    ]
    # rows (formed once more for every tile), the gradient by autograd as a check, and the training side's statistics
    formed = n_train if plan.strategy != "tiles" else 32
    checked = n_train if plan.strategy == "memory" else 32
    training = passes("", formed + checked, 1).seconds + passes("", n_train, 0).seconds
    out.append(StageForecast("training gradients, one row per sequence", formed + checked + n_train, training))
    out.append(passes("token statistics", n_eval, 0))
    again = n_train if plan.strategy == "tiles" else 0
    evaluation = passes("", n_eval * tiles, 4)
    seconds = evaluation.seconds + passes("", again, 1).seconds
    out.append(StageForecast("evaluation gradients and kernels", evaluation.passes + again, seconds))
    if kernel.save_gradients:
        out.append(StageForecast("storing the evaluation gradients", 2 * n_eval, 2 * passes("", n_eval, 1).seconds))
    if kernel.compute_full:
        # and the gradients of entropy that shares rest on, from one more pass over the evaluation side
        own, shares = passes("", n_train * tiles, 2), passes("", n_eval, 2)
        seconds = own.seconds + passes("", again, 1).seconds + shares.seconds
        out.append(StageForecast("the training buffer's own kernel", own.passes + again + n_eval, seconds))
        out.append(passes("checking the kernel against finite differences", 2 * min(16, n_eval), 0))
    if analysis.entropy_prediction:
        out += [passes(f"measuring at {s:g} x the step", n_eval, 0) for s in sorted({*analysis.step_scales, 1.0})]
        out.append(passes("checking the slope", 2 * n_eval, 0))
        fresh = len(analysis.fresh_scales)
        drawn = fresh * n_eval * rates.drawing + passes("", fresh * n_eval, 0).seconds
        out.append(StageForecast("analysis: entropy prediction", fresh * n_eval, drawn))
    if analysis.higher_order:
        out.append(passes("analysis: higher order", 2 * n_eval * sum(s <= 1 for s in {*analysis.step_scales, 1.0}), 0))
    if analysis.attribution:
        out.append(passes("analysis: attribution", 3 * n_train, 0))  # one in forward mode: three passes' work
    if analysis.intervention:
        out.append(passes("analysis: intervention", (analysis.intervention_subsets + 16) * n_eval, 0))
    if analysis.weighting_schemes and analysis.weighting_steps:
        out.append(passes("analysis: weighting schemes", 28 * n_eval, 0))
    return out
