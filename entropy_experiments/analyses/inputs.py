"""Everything that an analysis may ask for at one checkpoint: labelled arrays, and the model with its rows for real steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from entropy_core.adamw import Moments
from entropy_core.batch import SequenceBatch
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics
from entropy_experiments.analyses.arrays import KernelArrays, SequenceLabels, StepArrays
from entropy_experiments.analyses.left_out_evaluation_prompts import LeftOutNumbers, without_each_prompt
from entropy_experiments.buffers.sampling_plan import SamplingPlan
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import Buffers, TrainingBuffer
from entropy_experiments.step.effects_of_leaving_out import Contributions, decided_by_effect
from entropy_experiments.step.numbers import AnalysisNumbers
from entropy_experiments.step.real_steps import token_shares
from entropy_experiments.step.training_noise import TrainingNoise
from entropy_experiments.step.training_precision import TrainingPrecision
from entropy_experiments.step.training_side import TrainingSide
from rl_training.sampling import Policy, Rollouts


@dataclass(frozen=True)
class AnalysisInputs:
    """One analysed checkpoint, while its model and rows are at hand. gradients: as in FisherComputation."""

    model: nn.Module
    optimizer: Moments | None
    tokenizer: Any
    config: FisherAnalysisConfig
    plan: SamplingPlan
    evaluation: Rollouts
    training: TrainingBuffer
    eval_batch: SequenceBatch
    numbers: AnalysisNumbers
    side: TrainingSide
    gradients: dict[str, dict[str, Tensor]]
    training_noise: TrainingNoise | None = None
    """What another draw of the training buffer would change; None before `with_training_noise`, and where nothing was drawn."""
    training_precision: TrainingPrecision | None = None
    """What rounding in training changes; None before `with_training_precision`, and where there was none below the analysis'."""

    @property
    def buffers(self) -> Buffers:
        """Rows and columns of the kernel."""
        return Buffers(self.evaluation, self.training)

    @property
    def policy(self) -> Policy:
        """Who drew them."""
        return Policy(self.model, self.tokenizer, self.plan.sampling_config)

    @property
    def passes(self) -> PassSettings:
        """How passes are cut, with what the kernel's have learnt of the model's rows where these are of all parameters."""
        known = self.side.kernel.setup.passes
        return PassSettings(known.settings.token_batch_size) if known.restricted else known.settings

    def evaluation_labels(self) -> SequenceLabels:
        """Of the rows."""
        return label_sequences(self.evaluation, self.numbers.eval_statistics)

    def training_labels(self) -> SequenceLabels:
        """Of the columns."""
        return label_sequences(self.training.rollouts, self.numbers.train_statistics)

    def truncated(self) -> tuple[np.ndarray, np.ndarray]:
        """(n_eval,) and (n_train,) bool: which completions were cut before an end of sequence."""
        evaluation, training = (
            np.array([end == "truncated" for end in rollouts.endings(self.plan.sampling_config)], dtype=bool)
            for rollouts in (self.evaluation, self.training.rollouts)
        )
        return evaluation, training

    @cached_property
    def token_shares(self) -> Tensor:
        """(n_train, L) float64 on the CPU: the shares of completion tokens, nats per token; a row adds up to its sequence's.

        One pass over the training sequences, made once, unless that of the shares told them. There must be a step.
        """
        side, step = self.side, self.numbers.step
        assert side.weights is not None
        assert step is not None
        if step.attribution.tokens is not None:
            return step.attribution.tokens
        gradient = self.gradients[self.numbers.estimand.gradient]
        return token_shares(
            self.model,
            side.batch,
            side.known_step.share_direction(gradient),
            side.weights,
            side.known_step.clip,
            self.passes,
        ).cpu()

    @cached_property
    def left_out(self) -> LeftOutNumbers | None:
        """Products and effects of training sequences with each evaluation prompt left out, made once; None without a step, with a
        single prompt, where training rows are not kept in memory, and where no kernel was asked for.
        """
        step, statistics = self.numbers.step, self.numbers.eval_statistics
        if step is None or step.by_evaluation is None:
            return None
        return without_each_prompt(step.by_evaluation, self.eval_batch, statistics.entropy_sums())

    @cached_property
    def decisive(self) -> Contributions | None:
        """By evaluation sequence, of the number that decides who is named first: effects early in training, later shares."""
        step, weights = self.numbers.step, self.side.weights
        if step is None or weights is None or step.by_evaluation is None:
            return None
        if decided_by_effect(step.attribution.own_part_of_second_moment):
            return step.by_evaluation.effects
        found, scale = step.by_evaluation.products, step.attribution.step_factor * weights.double()
        scale = scale.to(found.per_completion.device)
        return Contributions(scale * found.per_completion, None if found.per_token is None else scale * found.per_token)

    def kernel_arrays(self, step_needed: bool = True) -> KernelArrays:
        """step_needed=False puts zeros where there is no step, for analyses that look at kernels alone.

        Raises ValueError where kernels, or the step, are missing.
        """
        kernels = self.numbers.kernels
        if kernels is None or (self.numbers.step is None and step_needed):
            raise ValueError("this analysis has no kernels, or no step")
        names = ("fisher", "entropy_fisher", "train_fisher", "train_entropy_fisher")
        matrices = {name: getattr(kernels, name).double().cpu().numpy() for name in names}
        return KernelArrays(**vars(self.step_arrays()), **matrices)

    def step_arrays(self) -> StepArrays:
        """The analysed step; zeros where there is none."""
        step, nothing = self.numbers.step, np.zeros(len(self.training.rollouts))

        def array(values: Tensor | None) -> np.ndarray:
            return nothing if values is None else values.double().cpu().numpy()

        return StepArrays(
            evaluation=self.evaluation_labels(),
            training=self.training_labels(),
            weights=array(self.side.weights),
            advantages=nothing if step is None else self.advantages(),
            shares=array(None if step is None else step.attribution.shares),
            products=array(None if step is None else step.attribution.products),
            step_factor=0.0 if step is None else step.attribution.step_factor,
            left_out_products=None if self.left_out is None else self.left_out.products,
        )

    def advantages(self) -> np.ndarray:
        """(n_train,) A_i; of sequences that came with weights alone, those that Dr. GRPO would have given these weights for.

        Raises ValueError where there are neither.
        """
        if self.training.advantages is not None:
            return self.training.advantages.double().numpy()
        if self.training.weights is None:
            raise ValueError("this analysis has no weights")
        return (
            self.training.weights * len(self.training.rollouts) * self.plan.sampling_config.max_completion_length
        ).numpy()


def label_sequences(rollouts: Rollouts, statistics: TokenStatistics) -> SequenceLabels:
    """The labels of one buffer."""
    return SequenceLabels(
        prompt_index=np.array(rollouts.prompt_index, dtype=np.int64),
        reward=np.array([np.nan if r is None else r for r in rollouts.reward], dtype=np.float64),
        length=np.array(rollouts.lengths, dtype=np.float64),
        entropy_sum=statistics.entropy_sums().cpu().numpy(),
        score=statistics.scores().cpu().numpy(),
        prompt=list(rollouts.prompt),
        completion=list(rollouts.completion),
    )
