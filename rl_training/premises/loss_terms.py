"""The names of what a GRPOTrainer's loss may hold beside  -sum_i w_i S_i , in the words of its
settings.
"""

from __future__ import annotations

from typing import Any

from torch import nn

ENTROPY, KL, ROUTER = "an entropy bonus", "a KL term", "the router's auxiliary loss"

# Losses of TRL whose policy-gradient part is a sum over tokens of (something) * log pi.
_REMEDIES = {
    ENTROPY: "set entropy_coef=0 and use_adaptive_entropy=False",
    KL: "set beta=0",
    ROUTER: "set router_aux_loss_coef=0",
}


def remedy(term: str) -> str:
    """How to switch off a term of `further_terms` (by the beginning of its name)."""
    return next(text for name, text in _REMEDIES.items() if term.startswith(name))


def further_terms(trainer: Any) -> list[str]:
    """Terms beside the policy gradient that the trainer's settings, as they are now, add to the
    loss; each with its setting.
    """
    found = []
    if getattr(trainer, "use_adaptive_entropy", False):
        found.append(f"{ENTROPY} (use_adaptive_entropy=True)")
    elif getattr(trainer, "entropy_coef", 0.0):
        found.append(f"{ENTROPY} (entropy_coef={trainer.entropy_coef:g})")
    if getattr(trainer, "beta", 0.0) and hasattr(trainer.args, "loss_type"):  # RLOOTrainer takes KL off the rewards
        found.append(f"{KL} (beta={trainer.beta:g})")
    if getattr(trainer, "aux_loss_enabled", False):
        found.append(f"{ROUTER} (router_aux_loss_coef={trainer.router_aux_loss_coef:g})")
    return found


def unequal_weights(trainer: Any) -> list[str]:
    """Settings of the trainer, as they are now, that give the tokens of a sequence other weights
    than A_i times a constant.
    """
    args = trainer.args

    def setting(name: str, default: Any) -> Any:
        return getattr(args, name, default)

    found = []
    if setting("num_iterations", 1) > 1:
        found.append(f"the ratio to an earlier policy (num_iterations={args.num_iterations})")
    per_generation, accumulated = setting("steps_per_generation", 1), setting("gradient_accumulation_steps", 1)
    if per_generation > accumulated:
        found.append(
            f"the ratio to an earlier policy (steps_per_generation={per_generation} over gradient_accumulation_steps="
            f"{accumulated})"
        )
    if setting("top_entropy_quantile", 1.0) < 1.0:
        found.append(f"a mask of tokens (top_entropy_quantile={args.top_entropy_quantile:g})")
    if setting("off_policy_mask_threshold", None) is not None:
        found.append(f"a mask of sequences (off_policy_mask_threshold={args.off_policy_mask_threshold:g})")
    if setting("use_vllm", False) and setting("vllm_importance_sampling_correction", False):
        found.append("an importance correction (vllm_importance_sampling_correction=True)")
    return found


def train_mode_noise(model: nn.Module) -> list[str]:
    """Settings of the model that make its training forward a random one."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.append(f"dropout (p={module.p:g}; set disable_dropout=True)")
        for key, value in vars(module).items():
            if key in ("neftune_noise_alpha", "jitter_noise", "router_jitter_noise") and value:
                found.append(f"{key}={value}")
    return list(dict.fromkeys(found))
