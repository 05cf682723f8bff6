"""Whether the policy that was loaded is the one that was saved, and whether its run kept its gradient premise.

Held against what the checkpoint's record says: log-probabilities of a few sequences under the policy that was saved
(rl_training.premises.policy_witness), and what the run found of its own gradient (rl_training.premises.gradient_premise).
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import torch
from torch import nn

from rl_training.errors import UserError
from rl_training.models.adapter_initialisation import REMEDY, unrepeatable_initialisation
from rl_training.models.load import is_dropout
from rl_training.premises.policy_witness import witness_differences, worst_difference
from rl_training.run.sidecar import Sidecar


def check_loaded_policy(model: nn.Module, folder: Path, sidecar: Sidecar | None, with_optimizer: bool = False) -> None:
    """Raises UserError where the loaded policy is another one than the saved one, or the record says that the run's gradient was
    not that of its weights. What the record does not tell is said once, as a warning.
    """
    random = _unrepeatable(folder)
    unknown = []
    if sidecar is None or sidecar.witness is None:
        if random is not None:
            raise UserError(
                f"{folder}: its adapter was initialised by {random!r}, which changes the base model, to something else each time "
                f"it is loaded; the policy of the run cannot be had again: {REMEDY}"
            )
        unknown.append("that the policy is the one that was saved (it records no log-probabilities to compare with)")
    else:
        _compare(model, folder, sidecar, random)
    if sidecar is not None:
        refuse_broken_premise(folder, sidecar)
        premise = sidecar.gradient_premise
        if premise is None or not premise.made:
            why = "no step had a gradient, or the release was older" if premise is None else premise.trouble
            unknown.append(f"that the run's gradient is the one that its recorded weights say ({why})")
        if sidecar.entropy_controller is not None:
            unknown.append(
                "what an entropy controller adds to the next step: the analysed one is the loss's own, without it"
            )
    if sidecar is None and (noise := _dropout(folder)):
        unknown.append(
            f"that the run trained without dropout ({noise} stands in its configuration; the policy analysed has none, and the "
            "gradients of a run with it are another's)"
        )
    if with_optimizer and (sidecar is None or sidecar.optimizer_class is None):
        unknown.append(
            "that torch's AdamW took its steps (no class is recorded, and a subclass may keep the same state)"
        )
    if with_optimizer and (sidecar is None or "optimizer.pt" not in sidecar.sha256):
        unknown.append(
            "that no two entries of optimizer.pt changed places (no digest is recorded; an analysis compares them with "
            "gradients, and its self-checks say how many pairs these tell apart)"
        )
    if unknown:
        warnings.warn(f"{folder}: not verified: {'; '.join(unknown)}", stacklevel=3)


def refuse_broken_premise(folder: Path, sidecar: Sidecar) -> None:
    """Raises UserError where the record says that the run's gradient was not that of its weights."""
    premise = sidecar.gradient_premise
    if premise is not None and premise.trouble is not None and premise.made:
        raise UserError(
            f"{folder}: at step {premise.step} the run's gradient was not the one that its recorded weights say: "
            f"{premise.trouble}. Its sequences cannot be weighed; train anew without that"
        )


def check_witness(folder: Path, sidecar: Sidecar, vocabulary: int | None) -> None:
    """Raises UserError for recorded sequences that no policy of this vocabulary can score; None: it is not known."""
    witness = sidecar.witness
    if witness is None:
        return
    count = len(witness.scores)
    tokens = [t for ids in (*witness.prompt_ids, *witness.completion_ids) for t in ids]
    whole = len(witness.prompt_ids) == len(witness.completion_ids) == count and all(map(math.isfinite, witness.scores))
    if not whole or not all(witness.completion_ids) or not all(0 <= t < (vocabulary or t + 1) for t in tokens):
        raise UserError(
            f"{folder}: the sequences that its record compares by are damaged, or of another vocabulary than its base model's: "
            "copy entropy_experiments.json again, or name the run's base model with checkpoint.model=..."
        )


def _compare(model: nn.Module, folder: Path, sidecar: Sidecar, random: str | None) -> None:
    assert sidecar.witness is not None
    sampling = sidecar.sampling
    try:
        recorded = getattr(torch, sidecar.dtype)
        found = witness_differences(model, sidecar.witness, sampling.temperature, sampling.pad_token_id, recorded)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{folder}: the sequences that its record compares by cannot be passed through the loaded model ({error}): the "
            "base model or its vocabulary is another one than the run's; name the run's with checkpoint.model=..."
        ) from error
    worst = worst_difference(found)
    if worst is None:
        return
    if random is not None:
        why = f"the adapter's initialisation {random!r} is random each time it is loaded: {REMEDY}"
    else:
        why = (
            f"the base model ({sidecar.model_name}), the adapter or the weights are not the run's any more: restore the files, "
            "name the run's base model with checkpoint.model=..., and load it as the run did, unquantised and in "
            f"{sidecar.dtype}"
        )
    raise UserError(
        f"{folder}: the loaded policy is not the one that was saved: a recorded sequence's log-probability differs by "
        f"{worst[0]:.3g} nats, where rounding explains {worst[1]:.2g}; {why}"
    )


def _dropout(folder: Path) -> str | None:
    """The probabilities of dropout above 0 that the checkpoint's adapter or model was made with, in words; None without."""
    found = {}
    for name in ("adapter_config.json", "config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        items = content.items() if isinstance(content, dict) else ()
        found |= {k: v for k, v in items if is_dropout(k) and isinstance(v, float) and v > 0}
    return ", ".join(f"{key}={value:g}" for key, value in found.items()) or None


def _unrepeatable(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    return unrepeatable_initialisation(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
