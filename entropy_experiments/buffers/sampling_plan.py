"""The task, the sampling configuration and the group size that both buffers of an analysis are
drawn with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from entropy_experiments.buffers.recorded_sampling import (
    recorded_rendering,
    refuse_another_distribution,
    refuse_other_prompts,
    warn_of_the_date,
)
from entropy_experiments.buffers.recorded_task import task_of_analysis, trainer_state_of
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.errors import UserError
from rl_training.sampling import SamplingConfig, make_sampling_config
from rl_training.tasks.task import Task, load_task

_NO_TASK = Task(name="none", train=[], heldout=[], reward_functions=[], origin="no task", reward_name="none")


@dataclass(frozen=True)
class SamplingPlan:
    """What the run's record and the configuration say together.

    Attributes:
        system_prompt: the task's, before every prompt.
    """

    task: Task
    sampling_config: SamplingConfig
    completions_per_prompt: int
    length_normalizer: str
    system_prompt: str | None = None
    trainer_state: Any = None
    """What reward functions that the user wrote are given as TRL's `trainer_state`."""


def plan_sampling(checkpoint: Checkpoint, config: FisherAnalysisConfig, trust: bool = False) -> SamplingPlan:
    """Put together the run's record and the configuration's overrides.

    No task is needed where both buffers are files that the user gives.

    Args:
        trust: see `task_of_analysis`.

    Raises:
        UserError: neither says what is needed, or where a temperature is given that the run did not
            train at.
    """
    sidecar, sampling = checkpoint.record.sidecar, config.entropy_analysis.sampling
    task_config = task_of_analysis(sidecar, config, trust)
    refuse_another_distribution(checkpoint)
    sampling_config = _sampling_config(checkpoint, config)
    size = sampling.completions_per_prompt or (sidecar.sampling.completions_per_prompt if sidecar else 8)
    drawn = sampling.train_sequences_path is None and sampling.train_completions == "sampled"
    if drawn and config.entropy_analysis.train_batch_size % size:
        raise UserError(
            f"entropy_analysis.train_batch_size {config.entropy_analysis.train_batch_size} is not a multiple of the {size} "
            "completions of a prompt"
        )
    normalizer = sidecar.algorithm.length_normalizer if sidecar else "constant"
    task = _NO_TASK if task_config is None else load_task(task_config)
    if config.checkpoint.task is None:
        refuse_other_prompts(checkpoint, sampling_config, task)
    warn_of_the_date(checkpoint, sampling_config)
    system_prompt = None if task_config is None else task_config.system_prompt
    return SamplingPlan(
        task, sampling_config, size, normalizer, system_prompt, trainer_state_of(checkpoint.record, task_config)
    )


def _sampling_config(checkpoint: Checkpoint, config: FisherAnalysisConfig) -> SamplingConfig:
    sidecar, sampling = checkpoint.record.sidecar, config.entropy_analysis.sampling
    temperature = sampling.temperature or (sidecar.sampling.temperature if sidecar else None)
    longest = sampling.max_completion_length or (sidecar.sampling.max_completion_length if sidecar else None)
    if temperature is None or longest is None:
        raise UserError(
            "the checkpoint does not say how completions were sampled: give entropy_analysis.sampling.temperature and "
            "max_completion_length"
        )
    if sidecar is None:
        return make_sampling_config(checkpoint.model, checkpoint.tokenizer, temperature, longest)
    recorded = sidecar.sampling
    for name, found, wanted in (
        ("temperature", temperature, recorded.temperature),
        ("max_completion_length", longest, recorded.max_completion_length),
    ):
        if found != wanted:
            raise UserError(
                f"entropy_analysis.sampling.{name}={found}, but the run was sampled with {wanted}: at another one it is "
                "another policy; leave it out"
            )
    return SamplingConfig(
        temperature,
        longest,
        tuple(recorded.eos_token_ids),
        recorded.pad_token_id,
        recorded.top_k,
        recorded.top_p,
        recorded_rendering(recorded),
    )
