"""What a running trainer knows that its checkpoint would not say, gathered for the sidecar."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rl_training.errors import UserError
from rl_training.generation.description import describe_sampling
from rl_training.generation.drawn_tokens import environment_of
from rl_training.premises.gradient_premise import GradientPremise, is_sharded
from rl_training.premises.policy_witness import witness_of
from rl_training.run.checkpoint_digests import checkpoint_digests, file_digest
from rl_training.run.rollouts import rollouts_path
from rl_training.run.sidecar import (
    SIDECAR_FORMAT,
    Sidecar,
    SidecarAlgorithm,
    SidecarGradientPremise,
    SidecarSampling,
    SidecarWitness,
)
from rl_training.sampling import SamplingConfig
from rl_training.tasks.difficulty import PassRates
from rl_training.tasks.task_sentence import scripted_task_in_words, task_in_words

_VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")


class LearningRateRecorder(TrainerCallback):
    """Remembers each group's learning rate just before the optimizer steps: afterwards the
    scheduler has moved on.

    Stops a run whose gradient is no longer finite, before it reaches the weights.
    """

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_pre_optimizer_step(self, *_args: Any, optimizer: torch.optim.Optimizer, **_kwargs: Any) -> None:
        self.used = [float(group["lr"]) for group in optimizer.param_groups]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise UserError(
                "the gradient is not finite: training has diverged; lower the learning rate, or go on from an earlier checkpoint"
            )


def optimizer_parameter_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[list[str]]:
    """Names in the order of the optimizer's integer ids, by identity.

    Raises:
        UserError: a parameter not in the model.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = getattr(optimizer, "optimizer", optimizer)
    out = []
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if id(p) not in names]
        if unknown:
            raise UserError(
                f"the optimizer trains a parameter of shape {tuple(unknown[0].shape)} that the model does not have"
            )
        out.append([names[id(p)] for p in group["params"]])
    return out


def optimizer_class(optimizer: Any) -> str:
    """Full name of the class that takes the step, accelerate's wrapper opened."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    return f"{kind.__module__}.{kind.__qualname__}"


def describe_run(
    folder: Path,
    trainer: Any,
    learning_rates: list[float],
    model_name: str | None,
    task: dict[str, Any] | None,
    pass_rates: PassRates,
) -> Sidecar:
    """The sidecar of the trainer's present state, whose files lie in `folder`; `trainer.args` is a
    DrGRPOConfig.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    sampling = describe_sampling(trainer)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantization = getattr(base.config, "quantization_config", None)
    return Sidecar(
        format=SIDECAR_FORMAT,
        step=trainer.state.global_step,
        model_name=model_name or str(base.config._name_or_path),
        dtype=str(base.dtype).removeprefix("torch."),
        mixed_precision=str(trainer.accelerator.mixed_precision),
        quantization=None if quantization is None else str(quantization),
        optimizer_parameter_names=optimizer_parameter_names(trainer.optimizer, model),
        learning_rates_used=learning_rates,
        sampling=SidecarSampling(
            temperature=sampling.temperature,
            top_p=float(args.top_p),
            top_k=int(args.top_k),
            max_completion_length=sampling.max_completion_length,
            eos_token_ids=list(sampling.eos_token_ids),
            pad_token_id=sampling.pad_token_id,
            prompts_per_step=int(args.generation_batch_size // args.num_generations),
            completions_per_prompt=int(args.num_generations),
            environment=environment_of(trainer),
            chat_template_sha256=sampling.template_sha256,
            chat_template_kwargs=dict(sampling.rendering.arguments),
            contents_in_parts=sampling.rendering.contents_in_parts,
            generation=dict(sampling.generation),
            training_noise=list(sampling.training_noise),
            adapters=list(sampling.adapters),
        ),
        algorithm=SidecarAlgorithm(
            scheme="dr_grpo",
            length_normalizer=args.length_normalizer,
            max_grad_norm=float(args.max_grad_norm),
            difficulty_weighting=args.difficulty_weighting,
            reject_zero_advantage=args.reject_zero_advantage,
            max_refill_rounds=args.max_refill_rounds,
        ),
        task=task,
        pass_rates=pass_rates.state_dict(),
        rank_count=trainer.accelerator.num_processes,
        versions={name: version(name) for name in _VERSIONS},
        optimizer_class=optimizer_class(trainer.optimizer),
        sha256=checkpoint_digests(folder),
        rollouts_sha256=file_digest(record) if (record := _rollouts(trainer)).is_file() else None,
        witness=_witness(trainer, model, sampling.sampling_config()),
        gradient_premise=_gradient_premise(trainer),
        entropy_controller=getattr(trainer, "entropy_controller", None),
    )


def run_facts(trainer: Any, model_name: str | None, task: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Name of the base model, and a run's settings in words for its model card."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = "an adapter" if hasattr(model, "peft_config") else "all weights"
    facts: dict[str, Any] = {
        "steps so far": trainer.state.global_step,
        "batch of a step": f"{args.generation_batch_size // args.num_generations} prompts × {args.num_generations} completions",
        "longest completion": f"{args.max_completion_length} tokens",
        "sampling temperature": f"{args.temperature:g}",
        "trained": f"{trained:,} parameters ({adapters})",
        "optimizer": f"AdamW, learning rate {args.learning_rate:g}",
        "versions": ", ".join(f"{name} {version(name)}" for name in _VERSIONS),
    }
    said = task_in_words(task) if task else scripted_task_in_words(trainer.train_dataset, trainer.reward_func_names)
    return model_name or str(base.config._name_or_path), {"task": said, **facts}


def _rollouts(trainer: Any) -> Path:
    return rollouts_path(Path(trainer.args.output_dir), trainer.state.global_step)


def _witness(trainer: Any, model: torch.nn.Module, sampling_config: SamplingConfig) -> SidecarWitness | None:
    """Log-probabilities of a few of this process's newest sequences; None where no process holds
    the whole model.
    """
    if is_sharded(trainer):
        return None
    return witness_of(model, trainer.unfiltered_rollouts, sampling_config.temperature, sampling_config.pad_token_id)


def _gradient_premise(trainer: Any) -> SidecarGradientPremise | None:
    check = GradientPremise.of(trainer).check
    if check is None:
        return None
    numbers = {name: getattr(check, name) for name in ("relative_error", "tolerance", "logprob_difference")}
    return SidecarGradientPremise(
        step=check.step,
        made=check.made,
        trouble=check.trouble,
        **{name: value if value == value else None for name, value in numbers.items()},
    )
