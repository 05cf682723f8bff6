"""Which optimizer wrote an `optimizer.pt`, told by the keys of its entries and groups; nothing of it is run.

Only torch's AdamW, and its Adam without coupled weight decay, have the step that is split here. What is known of others serves to
name them in a refusal: that a key is unknown is reason enough to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAMW_CLASSES = ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam")
STATE_KEYS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"})
# torch's own groups; the values of those that change the step are looked at one by one (optimizer_state).
REQUIRED_GROUP_KEYS = frozenset({"params", "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"})
# How the same step is computed, not which one; and what schedulers and the names of parameters leave behind.
HARMLESS_GROUP_KEYS = frozenset(
    {
        "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "param_names", "initial_lr", "max_lr",
        "min_lr", "swa_lr",
    }
)  # fmt: skip

# (name, keys of an entry or of a group one of which is enough); the first that fits is the name given.
_BY_KEY: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bitsandbytes' 8-bit optimizer", ("qmap1", "absmax1", "__bnb_optimizer_quant_state__")),
    ("an optimizer of bitsandbytes (32-bit or paged)", ("state1", "state2", "is_paged", "percentile_clipping")),
    ("a schedule-free optimizer", ("weight_sum", "lr_max", "train_mode", "weight_lr_power")),
    ("GaLore or APOLLO", ("projector", "update_proj_gap", "proj_type")),
    ("Prodigy or D-Adaptation", ("d_coef", "d0", "p0", "growth_rate", "d_numerator")),
    (
        "one whose betas a schedule moves (OneCycleLR or CyclicLR; cycle_momentum=False leaves them alone)",
        ("base_momentum", "max_momentum"),
    ),
    ("AdEMAMix", ("exp_avg_slow", "exp_avg_fast", "m2", "beta3_scheduler", "t_alpha", "t_beta3")),
    ("Adan", ("exp_avg_diff", "neg_pre_grad", "pre_grad", "previous_grad")),
    ("AdaBelief", ("exp_avg_var", "weight_decouple", "rectify")),
    ("GrokAdamW", ("grok_ema", "grok_exp_avg", "alpha_init", "gradient_alpha", "grokking_signal_decay_rate")),
    ("StableAdamW (torch-optimi)", ("kahan_comp", "kahan_sum", "decouple_lr", "triton")),
    ("AnyPrecisionAdamW", ("compensation", "use_kahan_summation", "momentum_dtype", "variance_dtype")),
    ("a cautious optimizer", ("cautious", "caution")),
    ("SOAP or Shampoo", ("GG", "Q", "preconditioner", "precondition_frequency")),
    ("Sophia", ("hessian", "hessian_moment")),
    ("Muon", ("ns_steps", "ns_coefficients", "use_muon", "adjust_lr_fn")),
    ("NAdam", ("mu_product", "momentum_decay")),
    ("Adamax", ("exp_inf",)),
    ("Adafactor", ("row_var", "exp_avg_sq_row", "beta2_decay", "scale_parameter", "relative_step")),
    ("Adadelta", ("acc_delta", "rho")),
    ("Adagrad", ("initial_accumulator_value", "lr_decay")),
    ("RMSprop", ("square_avg", "centered")),
    ("Rprop", ("etas", "step_sizes")),
    ("ASGD", ("lambd", "t0")),
    ("L-BFGS", ("history_size", "old_dirs")),
    ("SGD", ("dampening", "nesterov")),
    ("AdaLomo or LOMO", ("clip_grad_norm", "clip_grad_value")),
    ("the AdamW of DeepSpeed or Apex", ("bias_correction", "adam_w_mode")),
    ("the AdamW of transformers before version 5", ("correct_bias",)),
)  # fmt: skip

# A class whose objects stand in the file in place of plain tensors, by the start of its name.
_BY_CLASS = (
    ("torchao", "torchao's low-bit AdamW"),
    ("galore_torch", "GaLore"),
    ("apollo_torch", "APOLLO"),
    ("bitsandbytes", "an optimizer of bitsandbytes"),
    ("torch.distributed.tensor", "the sharded optimizer of a distributed run (DTensor)"),
    ("torch.distributed._tensor", "the sharded optimizer of a distributed run (DTensor)"),
    ("torch.distributed._shard", "the sharded optimizer of an FSDP run (ShardedTensor)"),
    ("deepspeed", "an optimizer of DeepSpeed"),
)


def name_by_keys(entries: Mapping[Any, Mapping[str, Any]], groups: list[Mapping[str, Any]]) -> str | None:
    """The optimizer's name in words; None where the keys are those of AdamW and Adam."""
    entry_keys = {str(key) for entry in entries.values() for key in entry}
    group_keys = {str(key) for group in groups for key in group}
    known = STATE_KEYS | REQUIRED_GROUP_KEYS | HARMLESS_GROUP_KEYS
    strange = (entry_keys | group_keys) - known
    for name, keys in _BY_KEY:
        if strange & set(keys):
            return name
    if strange or any(not group.keys() >= REQUIRED_GROUP_KEYS for group in groups):
        return _by_what_is_missing(entry_keys, groups, strange)
    if entries and not all({"exp_avg", "exp_avg_sq", "step"} <= entry.keys() for entry in entries.values()):
        return _by_what_is_missing(entry_keys, groups, strange)
    return None


def _by_what_is_missing(entry_keys: set[str], groups: list[Mapping[str, Any]], strange: set[str]) -> str:
    missing = {key for group in groups for key in REQUIRED_GROUP_KEYS - group.keys()}
    if strange:
        return f"another optimizer than AdamW (it keeps {', '.join(sorted(strange))})"
    if "exp_avg" in entry_keys and "exp_avg_sq" not in entry_keys:
        return "Lion, or another optimizer without second moments"
    if missing == {"amsgrad"}:
        return "RAdam"
    if missing == {"amsgrad", "weight_decay"}:
        return "SparseAdam"
    if missing:
        return f"another optimizer than AdamW (its groups have no {', '.join(sorted(missing))})"
    return f"another optimizer than AdamW (entries hold {', '.join(sorted(entry_keys)) or 'nothing'})"


def name_by_classes(classes: list[str]) -> str | None:
    """The optimizer's name by the classes of the objects in its file (full names); None for those that are not known."""
    for name in classes:
        for start, words in _BY_CLASS:
            if name.startswith(start):
                return words
    return None
