"""`optimizer.pt`, read as plain tensors and checked against everything that an AdamW state must be.

For Adam's moments of any gradients g_1 .. g_t, elementwise (Cauchy-Schwarz; b1 = beta1, b2 = beta2):

    m_t^2 <= v_t (1 - b1)^2 / (1 - b2) * sum_k (b1^2 / b2)^k ,  k = 0 .. t-1

so that damaged entries are seen without knowing the gradients. Source: docs/guides/checkpoints.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_training.errors import UserError
from rl_training.run.mapped_file import MappedPages, load_tensors
from rl_training.run.optimizer_relatives import ADAMW_CLASSES, STATE_KEYS, name_by_classes, name_by_keys

WITHOUT_IT = (
    "analyse without it by entropy_analysis.fisher_kernel.preconditioning=none (a plain gradient step, not this run's own), or "
    "train with optim=adamw_torch"
)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of m: where it is smaller, its square has no float32.
_UNDERFLOW = 1e-18
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def read_tensor_file(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, mapped where it can be. No object but plain tensors and numbers is ever built.

    Raises UserError for a file that is damaged, or holds more than plain tensors, which are then named.
    """
    try:
        return load_tensors(path)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        objects = _objects(path)
        if not objects:
            raise UserError(
                f"{path} cannot be read as plain tensors ({type(error).__name__}): it is damaged; copy it again"
            ) from error
        known = name_by_classes(objects)
        if known is not None:
            raise UserError(f"{path} is the state of {known}, which cannot be split: {WITHOUT_IT}") from error
        raise UserError(
            f"{path} cannot be read as plain tensors: it holds objects that would have to be executed ({objects[0]}); if it is "
            "not from a stranger, save it again as plain tensors"
        ) from error


def _objects(path: Path) -> list[str]:
    """Full names of what a file would execute, found by reading its opcodes; [] where these cannot be read."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the same many kinds: then it is damaged, which the caller says
        return []


def check_optimizer_state(
    path: Path, state: Any, steps: Sequence[int], recorded_class: str | None, trusted: bool, rounded: bool = False
) -> None:
    """Raises UserError unless `state` is that of AdamW (or of Adam without coupled decay) at its step, entry by entry.

    steps: counts it may have seen, the checkpoint's first; empty where nothing says. recorded_class: from the sidecar.
    trusted: the file is, by its digest, the one that the trainer wrote: parameters may then have seen fewer steps than the
    run (they had no gradient in some).
    """
    entries, groups = _structure(path, state)
    if recorded_class is not None and recorded_class not in ADAMW_CLASSES:
        raise UserError(f"{path} is the state of {recorded_class}, whose step cannot be split: {WITHOUT_IT}")
    name = name_by_keys(entries, groups)
    if name is not None:
        raise UserError(f"{path} is not the state of AdamW but of {name}, whose step cannot be split: {WITHOUT_IT}")
    if not entries:
        raise UserError(f"{path} holds no moments: it was saved before the first step; take a later checkpoint")
    group_of = {number: group for group in groups for number in group["params"]}
    for number, group in enumerate(groups):
        _check_group(path, number, group, recorded_class)
    stray = sorted(map(str, entries.keys() - group_of.keys()))
    if stray:
        raise UserError(f"{path} has an entry {stray[0]} that belongs to no group: it is damaged; copy it again")
    pages = MappedPages(path)
    for number, entry in entries.items():
        _check_entry(path, number, entry, group_of[number], rounded)
        pages.forget()
    _check_steps(path, {int(e["step"]) for e in entries.values()}, steps, trusted)


def _structure(path: Path, state: Any) -> tuple[Mapping[Any, Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(state, param_groups) of an optimizer's state dict."""
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise UserError(f"{path} is not an optimizer state (no 'state' and 'param_groups'): {WITHOUT_IT}")
    entries, groups = state["state"], state["param_groups"]
    whole = (
        isinstance(entries, dict)
        and all(isinstance(entry, dict) for entry in entries.values())
        and isinstance(groups, list)
        and all(isinstance(group, dict) and _are_numbers(group.get("params")) for group in groups)
    )
    if not whole or not groups:
        raise UserError(f"{path} is not an optimizer state of torch (its groups or entries are no dicts): {WITHOUT_IT}")
    return entries, groups


def _are_numbers(params: Any) -> bool:
    return isinstance(params, list) and all(type(number) is int for number in params)


def _check_group(path: Path, number: int, group: Mapping[str, Any], recorded_class: str | None) -> None:
    where = f"{path}, group {number}"
    values = [group["lr"], group["eps"], group["weight_decay"], *_pair(where, group["betas"])]
    if not all(_is_number(value) for value in values):
        raise UserError(f"{where}: lr, eps, weight_decay or betas is not a finite number: it is damaged; copy it again")
    lr, eps, decay, beta1, beta2 = map(float, values)
    if min(lr, eps, decay) < 0 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise UserError(
            f"{where}: lr {lr:g}, betas ({beta1:g}, {beta2:g}), eps {eps:g}, weight_decay {decay:g} are no settings of AdamW: "
            "it is damaged; copy it again"
        )
    if max(lr, decay) > 1e3 or eps > 1e3:
        raise UserError(
            f"{where}: lr {lr:g}, eps {eps:g}, weight_decay {decay:g} are beyond what any run has: it is damaged; copy it again"
        )
    flags = [name for name in ("maximize", "amsgrad") if type(group[name]) is not bool]
    if flags:
        raise UserError(f"{where}: {flags[0]} is neither true nor false: it is damaged; copy it again")
    if group["maximize"]:
        raise UserError(
            f"{where} was trained with maximize=True, a step up the loss, which is not known here: {WITHOUT_IT}"
        )
    decoupled = group.get("decoupled_weight_decay", True if recorded_class == ADAMW_CLASSES[0] else None)
    if decay and not decoupled:
        what = "couples weight decay into the gradient (Adam)" if decoupled is False else "does not say how it decays"
        raise UserError(f"{where} has weight_decay={decay:g} and {what}: only AdamW's decay can be split; {WITHOUT_IT}")


def _pair(where: str, betas: Any) -> Sequence[Any]:
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise UserError(f"{where} has {betas!r} for betas, AdamW has two: {WITHOUT_IT}")
    return betas


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):  # capturable optimizers keep the rate in a tensor
        return value.numel() == 1 and not value.is_meta and value.is_floating_point() and bool(torch.isfinite(value))
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_entry(path: Path, number: Any, entry: Mapping[str, Any], group: Mapping[str, Any], rounded: bool) -> None:
    where = f"{path}, entry {number}"
    wanted = STATE_KEYS if group["amsgrad"] else STATE_KEYS - {"max_exp_avg_sq"}
    if entry.keys() != wanted:
        odd = ", ".join(sorted(map(str, entry.keys() ^ wanted)))
        raise UserError(f"{where} does not hold what AdamW keeps (too much or missing: {odd}): {WITHOUT_IT}")
    step = entry["step"]
    if not (_is_number(step) and float(step) == int(step) and int(step) >= 1):
        raise UserError(f"{where} has step {step!r}, which is no count: it is damaged; copy it again")
    moments = [entry[name] for name in _MOMENTS if name in entry]
    for name, moment in zip(_MOMENTS, moments, strict=False):
        if type(moment) is not Tensor or moment.layout != torch.strided or moment.is_meta:
            raise UserError(f"{where}: {name} is no plain tensor ({type(moment).__name__}): {WITHOUT_IT}")
        if moment.dtype not in _FLOATS:
            kind = str(moment.dtype).removeprefix("torch.")
            known = "an 8-bit optimizer's" if kind in ("uint8", "int8") else "of no optimizer that is known"
            raise UserError(f"{where}: {name} is {kind}, {known}; only full AdamW moments can be read: {WITHOUT_IT}")
        if moment.shape != moments[0].shape:
            raise UserError(f"{where}: {name} has another shape than exp_avg: it is damaged; copy it again")
        if not bool(torch.isfinite(moment).all()):
            raise UserError(
                f"{where}: {name} holds NaN or infinite values: the optimizer's state is damaged, or the run diverged before "
                "this step; take an earlier checkpoint"
            )
    if _eps_is_lost(float(group["eps"]), moments[1:], bool(group.get("fused"))):
        raise UserError(
            f"{where}: eps {float(group['eps']):g} is nothing in its precision and some second moments are 0, so that the "
            "step is not finite: train with float32 weights (fp16=True or bf16=True for the passes alone) and an adam_epsilon "
            "above 1e-38; or analyse without it by entropy_analysis.fisher_kernel.preconditioning=none (a plain gradient step, "
            "not this run's own)"
        )
    _check_signs(where, moments[1:])
    if not rounded:
        _check_bound(where, moments[0], moments[1:], int(step), group)


def _eps_is_lost(eps: float, squares: list[Tensor], fused: bool) -> bool:
    """Whether P is infinite somewhere. The fused kernel adds eps in float32, whatever it stores."""
    kept = squares[0].dtype
    added = torch.float32 if fused and kept.itemsize < 4 else kept
    return not float(torch.tensor(eps, dtype=added)) and any(bool((v == 0).any()) for v in squares)


def _check_signs(where: str, squares: list[Tensor]) -> None:
    if any(bool((v < 0).any()) for v in squares):
        raise UserError(
            f"{where}: exp_avg_sq holds negative values, which no squares are: it is damaged; copy it again"
        )
    if len(squares) == 2 and bool((squares[1] < squares[0] * (1 - 1e-3)).any()):
        raise UserError(f"{where}: max_exp_avg_sq is below exp_avg_sq: it is damaged; copy it again")


def _check_bound(where: str, m: Tensor, squares: list[Tensor], step: int, group: Mapping[str, Any]) -> None:
    if m.dtype not in (torch.float32, torch.float64):
        return  # rounding of the moments breaks the bound
    beta1, beta2 = map(float, group["betas"])
    ratio = beta1**2 / beta2 if beta2 else math.inf
    if ratio >= 1:  # the sum grows with t, and says little
        return
    limit = math.sqrt((1 - beta1) ** 2 / (1 - beta2) * (1 - ratio**step) / (1 - ratio)) * 1.01
    if bool((m.abs() > limit * squares[0].sqrt() + _UNDERFLOW).any()):
        raise UserError(
            f"{where}: exp_avg is larger than exp_avg_sq allows for AdamW with betas ({beta1:g}, {beta2:g}) at step {step}: the "
            f"entries are damaged, or of another optimizer; copy it again, or {WITHOUT_IT}"
        )


def _check_steps(path: Path, found: set[int], steps: Sequence[int], trusted: bool) -> None:
    newest = max(found)
    if steps and newest not in steps:
        raise UserError(
            f"{path} has seen {newest} steps, the checkpoint is of step {steps[0]}: it belongs to another checkpoint; copy the "
            f"right one there, or {WITHOUT_IT}"
        )
    if len(found) > 1 and not trusted:
        raise UserError(
            f"{path}: some parameters have seen {min(found)} steps and others {newest}: these were trained in a part of the run "
            f"only, or the file is damaged, which cannot be told without the record of this project's trainer; {WITHOUT_IT}"
        )
