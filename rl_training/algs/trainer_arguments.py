"""Arguments of TRL's GRPOConfig under which completions, or the loss, are not those that are
analysed.

What a setting of the sampler does is known from the generator's final configuration, once there is
a trainer (rl_training.generation.description); this is the part that can be seen before. An
argument that is in no list here came with a release of TRL that was never looked at: at its default
it does nothing new, otherwise it is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rl_training.errors import UserError
from rl_training.generation.settings import departures, plain
from rl_training.run.record_ranges import LARGEST_GRADIENT_NORM

# What TRL 1.12 to 1.16 know, whatever it does: what matters of it is checked by name here, in
# DrGRPOConfig, or on the trainer.
_KNOWN = frozenset(
    "beta cache_implementation cast_lm_head_to_fp32 chat_template_kwargs delta disable_dropout entropy_coef entropy_coef_delta "
    "entropy_coef_max entropy_coef_min entropy_target epsilon epsilon_high generation_batch_size generation_kwargs "
    "importance_sampling_level log_completions log_completions_hub_repo log_multimodal log_unique_prompts loss_type "
    "mask_truncated_completions max_completion_length max_tool_calling_iterations min_p model_init_kwargs "
    "multi_objective_aggregation num_completions_to_print num_generations num_generations_eval num_iterations "
    "off_policy_mask_threshold pad_to_multiple_of ref_model_mixup_alpha ref_model_sync_steps repetition_penalty reward_weights "
    "router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos scale_rewards shuffle_dataset steps_per_generation "
    "sync_ref_model temperature top_entropy_quantile top_k top_p transformers_continuous_batching_config trust_remote_code "
    "use_adaptive_entropy use_bias_correction_kl use_transformers_continuous_batching use_transformers_paged use_vllm "
    "vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode vllm_gpu_memory_utilization "
    "vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min "
    "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_max_model_length vllm_mode vllm_model_impl "
    "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex "
    "vllm_tensor_parallel_size ds3_gather_for_generation use_liger_kernel max_prompt_length wandb_log_unique_prompts "
    "learning_rate logging_steps gradient_checkpointing bf16 remove_unused_columns average_tokens_across_devices "
    "lr_scheduler_kwargs torch_empty_cache_steps".split()
)
_OFF = {
    "use_vllm": "another engine draws the completions, in a precision of its own, and the loss is corrected for it",
    "use_transformers_continuous_batching": "another engine draws the completions, from rounded weights under bf16",
    "use_transformers_paged": "another engine draws the completions, from rounded weights under bf16",
    "neftune_noise_alpha": "noise on the embeddings makes the loss that of another policy than the one that is analysed",
}


def refuse_arguments(args: Any) -> None:
    """Raises UserError, by its name, for an argument of `args` that takes completions away from the
    softmax, or is unknown.
    """
    norm = args.max_grad_norm
    if not isinstance(norm, int | float) or not 0 <= norm <= LARGEST_GRADIENT_NORM:
        raise UserError(
            f"max_grad_norm={norm!r}: a checkpoint's record needs a number from 0 on; 0 means that gradients are not clipped"
        )
    for name, effect in _OFF.items():
        if value := getattr(args, name, None):
            raise UserError(f"{name}={value!r}: {effect}; leave it out")
    of_sampler = {name: getattr(args, name, None) for name in ("min_p", "cache_implementation")}
    given = {name: plain(value) for name, value in dict(args.generation_kwargs or {}).items()}
    same = {"temperature": args.temperature, "max_new_tokens": args.max_completion_length}
    for name, value in given.items():
        if name in same and value != same[name]:
            other = "max_completion_length" if name == "max_new_tokens" else name
            raise UserError(
                f"generation_kwargs sets {name}={value!r}, but {other}={same[name]!r}: completions must come from the "
                f"distribution differentiated; set {other} and leave it out there"
            )
    for where, settings in (("", of_sampler), ("generation_kwargs sets ", given)):
        if found := departures(settings, None, "(or leave it out)"):
            raise UserError(where + found[0].sentence())
    for field in _fields_of_trl(type(args)):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in _KNOWN and getattr(args, field.name) != default:
            raise UserError(
                f"{field.name}={getattr(args, field.name)!r}: not known to leave sampling and loss as they are analysed; leave "
                f"it at {default!r}"
            )


def _fields_of_trl(config: type) -> list[dataclasses.Field]:
    """The fields that TRL's own classes add to transformers' TrainingArguments."""
    trl = [c for c in config.__mro__ if c.__module__.split(".")[0] == "trl" and dataclasses.is_dataclass(c)]
    named = {name for c in trl for name in c.__dict__.get("__annotations__", {})}
    return [field for field in dataclasses.fields(config) if field.name in named]
