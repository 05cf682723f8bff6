"""What says whether two analyses may be compared: sampling configuration, tokenizer, and how the run was trained."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from entropy_experiments.buffers.sampling_plan import SamplingPlan
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.records.summary import PolicyRecord, SamplingConfigRecord, TrainingSettings


def describe_policy(checkpoint: Checkpoint, plan: SamplingPlan) -> PolicyRecord:
    """The policy's tokenizer, the sampling configuration and, where recorded, how it was trained."""
    sampling_config, sidecar = plan.sampling_config, checkpoint.record.sidecar
    training = None
    if sidecar is not None:
        training = TrainingSettings(
            scheme=sidecar.algorithm.scheme,
            length_normalizer=sidecar.algorithm.length_normalizer,
            difficulty_weighting=sidecar.algorithm.difficulty_weighting,
            reject_zero_advantage=sidecar.algorithm.reject_zero_advantage,
            max_grad_norm=sidecar.algorithm.max_grad_norm,
            learning_rate=sidecar.learning_rates_used[0] if sidecar.learning_rates_used else None,
            prompts_per_step=sidecar.sampling.prompts_per_step,
            completions_per_prompt=sidecar.sampling.completions_per_prompt,
        )
    return PolicyRecord(
        tokenizer=tokenizer_fingerprint(checkpoint.tokenizer),
        sampling_config=SamplingConfigRecord(
            temperature=sampling_config.temperature, max_completion_length=sampling_config.max_completion_length
        ),
        task=plan.task.origin,
        training=training,
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The first 16 digits of the SHA-256 of the vocabulary, token -> id: equal tokens make equal entropies per token."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode("ascii")).hexdigest()[:16]
