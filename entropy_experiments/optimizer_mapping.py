"""Which parameter each numbered entry of `optimizer.pt` belongs to, and checks that it really does.

The Hugging Face Trainer numbers optimizer entries in the order of `named_parameters()` that require gradients, those with
weight decay first, then biases and normalisation weights. Adapters of one shape abound, so shapes alone prove little:
entries are matched by the sidecar's names, which must agree with that rule, and are then held against fresh gradients:
sqrt(v) of a parameter must look like |g| of that same parameter more than like that of its same-shaped siblings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

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

    recorded: the sidecar's names, if any.

    Raises UserError where the recorded names, the Trainer's rule, the model and the stored shapes do not all agree.
    """
    groups = state["param_groups"]
    rebuilt = rebuild_parameter_names(model)
    if len(groups) == 1 and len(rebuilt) == 2:  # some trainers put everything into one group
        rebuilt = [[name for name, p in model.named_parameters() if p.requires_grad]]
    expected = [len(names) for names in rebuilt]
    found = [len(group["params"]) for group in groups]
    if expected != found:
        raise UserError(
            f"the optimizer state holds {found} entries by group, the model has {expected} trainable parameters: the adapter or "
            "the set of trained modules differs from training; load the checkpoint with the model it was trained with"
        )
    if recorded is not None and [list(names) for names in recorded] != rebuilt:
        odd = next(
            (
                (a, b)
                for left, right in zip(recorded, rebuilt, strict=False)
                for a, b in zip(left, right, strict=False)
                if a != b
            ),
            ("", ""),
        )
        raise UserError(
            f"the sidecar names optimizer entry {odd[0]!r} where the model's own order has {odd[1]!r}: the sidecar or "
            "the adapter is of another run; on such doubt nothing is analysed"
        )
    parameters = dict(model.named_parameters())
    for group, names in zip(groups, rebuilt, strict=True):
        for number, name in zip(group["params"], names, strict=True):
            entry = state["state"].get(number)
            if entry is not None and entry["exp_avg"].shape != parameters[name].shape:
                raise UserError(
                    f"optimizer entry {number} is {tuple(entry['exp_avg'].shape)} but its parameter {name!r} is "
                    f"{tuple(parameters[name].shape)}: the entries are in another order than the model's parameters"
                )
    return rebuilt


@dataclass(frozen=True)
class MappingEvidence:
    """`share` of the `compared` matrices with same-shaped siblings whose v fits their own gradient best; `by_chance` would."""

    share: float
    compared: int
    worst: str | None
    by_chance: float

    def required(self, names_recorded: bool) -> float:
        """The share below which the mapping is not believed.

        A permuted mapping matches as often as chance or less (7% measured on a policy of two layers). Names that were recorded
        with the checkpoint are believed from a fifth on, for early in a run and with few layers even a true mapping may show
        no more than a third. Names that were rebuilt need more.
        """
        return 0.2 if names_recorded else max(self.by_chance, 0.3)

    def convincing(self, names_recorded: bool) -> bool:
        """Whether the mapping may be used."""
        return self.compared == 0 or self.share >= self.required(names_recorded)


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
