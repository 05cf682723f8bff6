"""A run's recorded steps, taken again: from a checkpoint, by the recorded sequences and weights, step after step.

    theta_t = theta_t-1 + dtheta_t          g_t = -sum_i w_i dS_i(theta_t-1) of the sequences that step t recorded

Where the run saved a checkpoint, the weights and moments that were had are held against its own, and go on from those. Nothing
is drawn: what the run drew is in its records. Source: docs/analyses/ledger.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState, after_gradient
from entropy_core.batch import SequenceBatch
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.forward import input_device
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_experiments.buffers.sampling_plan import SamplingPlan, plan_sampling
from entropy_experiments.buffers.saved import recorded_training
from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.checkpoints.folder import checkpoint_step, existing_folder
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.ledger.partitions import Gradient, by_sequence
from entropy_experiments.step.optimizer_step import NextStep, take_next_step
from rl_training.errors import UserError
from rl_training.run.rollouts import rollouts_path
from rl_training.run.run_files import checkpoints_of
from rl_training.sampling import Rollouts

LARGEST_GAP = 0.05
"""Of the way between two checkpoints, by which the weights had may be off at the second one."""


@dataclass(frozen=True)
class RecordedStep:
    """One step before it is taken again. gradients: (prompt, kind) -> its part of the loss gradient; whole: their sum."""

    number: int
    rollouts: Rollouts
    batch: SequenceBatch
    weights: Tensor
    gradients: dict[tuple[int, str], Gradient]
    whole: Gradient
    step: NextStep


class RunAgain:
    """The recorded steps of a run folder from its first checkpoint on; `checkpoint.model` is at the weights of the moment.

    Args:
        run: folder of a run.
        device: as for `load_checkpoint`.
        trust: whether the run's task may open files and import.
        last: step to stop at; by default the last checkpoint's.

    Raises:
        UserError: no two checkpoints with recorded steps between them.
    """

    def __init__(
        self, run: Path, device: str = "auto", trust: bool = False, last: int | None = None, first: int | None = None
    ) -> None:
        self.run, self._device = run, device
        self._saved = {checkpoint_step(path): path for path in checkpoints_of(run)}
        self.first, self.last = self._span(first, last)
        self.checkpoint: Checkpoint = self._load(self.first)
        self.plan: SamplingPlan = plan_sampling(self.checkpoint, FisherAnalysisConfig(), trust)
        self.state = _own(self.checkpoint)
        sidecar = self.checkpoint.record.sidecar
        self.max_norm = 1.0 if sidecar is None else sidecar.algorithm.max_grad_norm
        self.passes: PassSettings = DEFAULT_PASSES
        self.worst_gap: float | None = None
        self._rates = _rates(self._load_log())
        self._at_last_checkpoint = _weights(self.model)

    def _span(self, first: int | None, last: int | None) -> tuple[int, int]:
        if not self._saved:
            existing_folder(self.run)
            if (self.run / "trainer_state.json").exists():
                raise UserError(
                    f"{self.run} is one checkpoint: a ledger goes from one to another; name the run, its folder"
                )
            raise UserError(
                f"{self.run} holds no checkpoint: a ledger goes from one to another; set training.save_every"
            )
        start = min(self._saved) if first is None else first
        if start not in self._saved:
            raise UserError(f"{self.run} has no checkpoint-{start}: begin at one of {sorted(self._saved)}")
        reached = start
        while rollouts_path(self.run, reached + 1).exists():
            reached += 1
        ends = [step for step in self._saved if start < step <= (reached if last is None else min(reached, last))]
        if not ends:
            raise UserError(
                f"{self.run}: after checkpoint-{start} no later checkpoint is reached by recorded steps (rollouts/ has them up "
                f"to step {reached}): a ledger needs two checkpoints and every step between them"
            )
        return start, max(ends)

    @property
    def model(self) -> nn.Module:
        """The policy at the weights of the moment."""
        return self.checkpoint.model

    def steps(self) -> Iterator[RecordedStep]:
        """Every step before it is taken; it is taken when the next is asked for."""
        for number in range(self.first + 1, self.last + 1):
            recorded = self._recorded(number)
            yield recorded
            self._take(recorded)

    def sequences(self, number: int) -> tuple[Rollouts, SequenceBatch, Tensor]:
        """What a step recorded: sequences, the same as tensors, and (N,) weights."""
        rollouts, _ = recorded_training(self.run, number, self.plan)
        batch = rollouts.to_batch(self.plan.sampling_config).to(input_device(self.model))
        return rollouts, batch, torch.tensor([s.weight for s in rollouts], dtype=torch.float64)

    def _recorded(self, number: int) -> RecordedStep:
        sampling = self.plan.sampling_config
        rollouts, batch, weights = self.sequences(number)
        gradients = by_sequence(self.model, batch, weights, rollouts, sampling.eos_token_ids, self.passes)
        parameters = trainable_parameters(self.model)
        whole = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for part in gradients.values():
            for name, g in part.items():
                whole[name] = whole[name] + g
        return RecordedStep(number, rollouts, batch, weights, gradients, whole, self.next_step(whole, number))

    def next_step(self, gradient: Gradient, number: int) -> NextStep:
        """The optimizer's step `number` with this gradient."""
        return take_next_step(self.model, self.state, gradient, self.max_norm, self._rates.get(number))

    def _take(self, recorded: RecordedStep) -> None:
        self.advance(recorded.step)
        if recorded.number in self._saved:
            self._hold_against(recorded.number)

    def advance(self, step: NextStep) -> None:
        """Take a step: weights and moments."""
        taken = {name: step.parameter_delta[name] for name in step.state}
        states = {}
        for name, state in step.state.items():
            clipped = step.clipped(name)
            states[name] = state if clipped is None else after_gradient(state, clipped)
        with torch.no_grad():
            for name, p in trainable_parameters(self.model).items():
                p.add_(taken[name])
        self.state = states

    def _hold_against(self, number: int) -> None:
        """Compare the weights with a checkpoint's, and go on from that."""
        had, before = _weights(self.model), self._at_last_checkpoint
        self.checkpoint = self._load(number)
        there = _weights(self.model)
        off = sum(float((had[n] - there[n]).double().square().sum()) for n in there) ** 0.5
        way = sum(float((there[n] - before[n]).double().square().sum()) for n in there) ** 0.5
        gap = off / way if way else 0.0
        if not gap <= LARGEST_GAP:
            raise UserError(
                f"{self.run}: taken again, the recorded steps up to {number} end {gap:.1%} of the way off checkpoint-{number}: "
                "the loss held more than the recorded weights (KL, several steps on the same sequences, clipped ratios), or "
                "files are of different runs; a ledger of this run would be wrong"
            )
        self.worst_gap = max(gap, self.worst_gap or 0.0)
        self.state, self._at_last_checkpoint = _own(self.checkpoint), there

    def _load(self, step: int) -> Checkpoint:
        return load_checkpoint(self._saved[step], device=self._device)

    def _load_log(self) -> list[dict[str, object]]:
        return self._load(self.last).record.log_history if self.last != self.first else []


def _own(checkpoint: Checkpoint) -> dict[str, AdamWParameterState]:
    """The moments, in memory of their own."""
    assert checkpoint.optimizer is not None
    return {
        name: replace(state, exp_avg=state.exp_avg.clone(), exp_avg_sq=state.exp_avg_sq.clone())
        for name, state in ((name, checkpoint.optimizer[name]) for name in checkpoint.optimizer)
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def _rates(log: list[dict[str, object]]) -> dict[int, float]:
    """Step -> learning rate, where it was logged."""
    found = {}
    for row in log:
        step, rate = row.get("step"), row.get("learning_rate")
        if isinstance(step, int) and isinstance(rate, float) and rate > 0:
            found[step] = rate
    return found
