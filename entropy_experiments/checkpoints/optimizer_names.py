"""Which parameter each numbered entry of `optimizer.pt` belongs to, and checks that it really does.

The Hugging Face Trainer numbers optimizer entries in the order of `named_parameters()` that require gradients, those with
weight decay first, then biases and normalisation weights. Adapters of one shape abound, so shapes alone prove little:
entries are matched by the sidecar's names, which must agree with that rule, and are then checked against fresh gradients:
sqrt(v) of a parameter must look like |g| of that same parameter more than like that of its same-shaped siblings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState
from rl_training.errors import UserError


def rebuild_parameter_names(model: nn.Module) -> list[list[str]]:
    """Names per optimizer group as the Trainer orders them: [decayed], [not decayed], empty groups left in."""
    from transformers import Trainer

    # The rule has no state: it is asked of the very method that made the groups, so that it follows its releases.
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return [[n for n in trainable if n in decayed], [n for n in trainable if n not in decayed]]


def match_names(
    model: nn.Module, state: Mapping[str, Any], recorded: Sequence[Sequence[str]] | None
) -> list[list[str]]:
    """Names per group for a loaded optimizer state dict.

    recorded: the sidecar's names, if any. Without them the Trainer's groups, one single group and PEFT's LoRA+ are tried.

    Raises UserError where the recorded names, the model's own order and the stored shapes do not all agree, or where not
    exactly one way of grouping fits.
    """
    groups = state["param_groups"]
    found = [len(group["params"]) for group in groups]
    if recorded is not None:
        names = _recorded_names(model, recorded, found)
        _check_shapes(model, state, names)
        return names
    candidates = [names for names in _known_groupings(model) if [len(group) for group in names] == found]
    if not candidates:
        raise _sizes_differ(model, found)
    fitting, odd = [], None
    for names in candidates:
        try:
            _check_shapes(model, state, names)
        except UserError as error:
            odd = error
            continue
        if names not in fitting:
            fitting.append(names)
    if not fitting and odd is not None:
        raise odd
    if len(fitting) > 1:
        raise UserError(
            f"the optimizer's {len(found)} groups of {found} entries fit the model's parameters in more than one way, and "
            "nothing records which is right; on such doubt nothing is analysed"
        )
    return fitting[0]


def _recorded_names(model: nn.Module, recorded: Sequence[Sequence[str]], found: list[int]) -> list[list[str]]:
    """The sidecar's names, where each group holds the model's own parameters in the model's own order."""
    names = [list(group) for group in recorded]
    order = {name: place for place, (name, p) in enumerate(model.named_parameters()) if p.requires_grad}
    listed = [name for group in names for name in group]
    if [len(group) for group in names] != found:
        raise _sizes_differ(model, found)
    unknown = sorted(set(listed) ^ order.keys())
    if unknown or len(set(listed)) < len(listed):
        odd = unknown[0] if unknown else next(name for name in listed if listed.count(name) > 1)
        raise UserError(
            f"the sidecar and the model do not name the same trained parameters, e.g. {odd!r}: the sidecar or the adapter is of "
            "another run; on such doubt nothing is analysed"
        )
    for group in names:
        for one, next_one in pairwise(group):
            if order[one] > order[next_one]:
                raise UserError(
                    f"the sidecar names optimizer entry {one!r} where the model's own order has {next_one!r}: the sidecar or the "
                    "adapter is of another run; on such doubt nothing is analysed"
                )
    return names


def _known_groupings(model: nn.Module) -> list[list[list[str]]]:
    """Names per group as the usual trainers make them: the Trainer's two, one with everything, PEFT's LoRA+."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return [rebuild_parameter_names(model), [trainable], _lora_plus_names(model)]


def _lora_plus_names(model: nn.Module) -> list[list[str]]:
    """Groups of peft.optimizers.create_loraplus_optimizer, asked of itself; empty where it does not apply."""
    from peft.optimizers import create_loraplus_optimizer

    if not any("lora_B" in name for name, p in model.named_parameters() if p.requires_grad):
        return []
    names = {id(p): name for name, p in model.named_parameters()}
    made = create_loraplus_optimizer(cast(Any, model), torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=2.0)
    return [[names[id(p)] for p in group["params"]] for group in made.param_groups]


def _sizes_differ(model: nn.Module, found: list[int]) -> UserError:
    expected = [len(names) for names in rebuild_parameter_names(model)]
    return UserError(
        f"the optimizer state holds {found} entries by group, the model has {expected} trainable parameters: the adapter or "
        "the set of trained modules differs from training; load the checkpoint with the model it was trained with"
    )


def _check_shapes(model: nn.Module, state: Mapping[str, Any], names: list[list[str]]) -> None:
    """Raises UserError where an entry has another shape than its parameter."""
    parameters = dict(model.named_parameters())
    for group, group_names in zip(state["param_groups"], names, strict=True):
        if list(group.get("param_names", group_names)) != group_names:
            raise UserError(
                f"the optimizer's own names of its parameters begin with {group['param_names'][0]!r}, the model's with "
                f"{group_names[0]!r}: the entries are of another model, or in another order"
            )
        for number, name in zip(group["params"], group_names, strict=True):
            entry = state["state"].get(number)
            if entry is not None and entry["exp_avg"].shape != parameters[name].shape:
                raise UserError(
                    f"optimizer entry {number} is {tuple(entry['exp_avg'].shape)} but its parameter {name!r} is "
                    f"{tuple(parameters[name].shape)}: the entries are in another order than the model's parameters"
                )


OptimizerRecord = Literal["none", "names", "digest"]
"""What a checkpoint's record says of its optimizer's entries: nothing, their names, or the digest of the very file as well."""


@dataclass(frozen=True)
class MappingEvidence:
    """`share` of the `compared` matrices with same-shaped siblings whose v fits their own gradient best; `by_chance` would."""

    share: float
    compared: int
    worst: str | None
    by_chance: float

    def required(self, record: OptimizerRecord) -> float:
        """The share below which the mapping is not believed.

        A permuted mapping matches as often as chance or less (7% measured on a policy of two layers). Names that were recorded
        with the checkpoint are believed from a fifth on, for early in a run and with few layers even a true mapping may show
        no more than a third. Names that were rebuilt need more.
        """
        return 0.2 if record != "none" else max(self.by_chance, 0.3)

    def convincing(self, record: OptimizerRecord) -> bool:
        """Whether the mapping may be used."""
        return self.compared == 0 or self.share >= self.required(record)


def mapping_evidence(state: Mapping[str, AdamWParameterState], gradients: Mapping[str, Tensor]) -> MappingEvidence:
    """Hold every parameter's second moments against fresh gradients of itself and of its same-shaped siblings.

    gradients: name -> a loss gradient at the checkpoint. Similarity is the correlation of log profiles (means of squares
    along each axis), which keep their shape while the size of gradients falls. Vectors (biases, norms) have no profile and
    are left to the checks of names and shapes.
    """
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, gradient in gradients.items():
        if gradient.dim() >= 2 and float(gradient.abs().sum()) > 0 and float(state[name].exp_avg_sq.abs().sum()) > 0:
            by_shape[tuple(gradient.shape)].append(name)
    right, compared, worst, worst_gap, by_chance = 0, 0, None, 0.0, 0.0
    for names in by_shape.values():
        if len(names) < 2:
            continue
        second = np.stack([_profile(state[name].exp_avg_sq) for name in names])
        fresh = np.stack([_profile(gradients[name].square()) for name in names])
        similarity = second @ fresh.T
        own = similarity.diagonal()
        gap = similarity.max(1) - own
        right += int((gap <= 1e-12).sum())
        compared += len(names)
        by_chance += 1.0  # one of k siblings fits best by chance, for each of k
        if gap.max() > worst_gap:
            worst_gap, worst = float(gap.max()), names[int(gap.argmax())]
    return MappingEvidence(right / compared if compared else 1.0, compared, worst, by_chance / max(compared, 1))


def _profile(squares: Tensor) -> np.ndarray:
    """Unit vector of centred log means of `squares` along each axis: which rows and columns are large."""
    squares = squares.detach().double().cpu()
    if squares.dim() < 2:
        parts = [squares.flatten()]
    else:
        flat = squares.flatten(1)
        parts = [flat.mean(1), flat.mean(0)]
    logs = [torch.log(part + 1e-30) for part in parts]
    vector = torch.cat([(part - part.mean()) / len(part) ** 0.5 for part in logs]).numpy()
    return vector / (np.linalg.norm(vector) + 1e-30)
