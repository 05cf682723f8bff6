"""The task, the law and the group size that both buffers of an analysis are drawn with."""

from __future__ import annotations

from dataclasses import dataclass

from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.config import TaskConfig
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from rl_training.sampling import SamplingLaw, sampling_law
from rl_training.tasks import Task, load_task

_NO_TASK = Task(name="none", train=[], heldout=[], reward_functions=[], origin="no task", reward_name="none")


@dataclass(frozen=True)
class SamplingPlan:
    """What the run's record and the configuration say together. system_prompt: the task's, before every prompt."""

    task: Task
    law: SamplingLaw
    completions_per_prompt: int
    length_normalizer: str
    system_prompt: str | None = None


def plan_sampling(checkpoint: Checkpoint, config: FisherAnalysisConfig) -> SamplingPlan:
    """Put together the run's record and the configuration's overrides.

    Raises UserError where neither says what is needed, or where a temperature is given that the run did not train at. No
    task is needed where both buffers are files of one's own.
    """
    sidecar, sampling = checkpoint.record.sidecar, config.entropy_analysis.sampling
    task_config = config.checkpoint.task
    if task_config is None and sidecar is not None and sidecar.task is not None:
        task_config = validate_config(TaskConfig, sidecar.task, "the checkpoint's task")
    if task_config is None and not (sampling.eval_sequences_path and sampling.train_sequences_path):
        raise UserError(
            "the checkpoint does not say which task it was trained on: give checkpoint.task in the configuration"
        )
    law = _law(checkpoint, config)
    size = sampling.completions_per_prompt or (sidecar.sampling.completions_per_prompt if sidecar else 8)
    drawn = sampling.train_sequences_path is None and sampling.train_completions == "sampled"
    if drawn and config.entropy_analysis.train_batch_size % size:
        raise UserError(
            f"entropy_analysis.train_batch_size {config.entropy_analysis.train_batch_size} is not a multiple of the {size} "
            "completions of a prompt"
        )
    normalizer = sidecar.algorithm.length_normalizer if sidecar else "constant"
    task = _NO_TASK if task_config is None else load_task(task_config)
    return SamplingPlan(task, law, size, normalizer, None if task_config is None else task_config.system_prompt)


def _law(checkpoint: Checkpoint, config: FisherAnalysisConfig) -> SamplingLaw:
    sidecar, sampling = checkpoint.record.sidecar, config.entropy_analysis.sampling
    temperature = sampling.temperature or (sidecar.sampling.temperature if sidecar else None)
    longest = sampling.max_completion_length or (sidecar.sampling.max_completion_length if sidecar else None)
    if temperature is None or longest is None:
        raise UserError(
            "the checkpoint does not say how completions were sampled: give entropy_analysis.sampling.temperature and "
            "max_completion_length"
        )
    if sidecar is None:
        return sampling_law(checkpoint.model, checkpoint.tokenizer, temperature, longest)
    recorded = sidecar.sampling
    for name, found, wanted in (
        ("temperature", temperature, recorded.temperature),
        ("max_completion_length", longest, recorded.max_completion_length),
    ):
        if found != wanted:
            raise UserError(
                f"entropy_analysis.sampling.{name}={found}, but the run was sampled with {wanted}: under another law it is "
                "another policy; leave it out"
            )
    return SamplingLaw(
        temperature, longest, tuple(recorded.eos_token_ids), recorded.pad_token_id, recorded.top_k, recorded.top_p
    )
