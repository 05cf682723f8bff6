"""One pass in which equal tokens are multiplied once, and what passes have found out about a model's layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket
from entropy_core.passes.token_plan import TokenPlan, disagreement


@dataclass(eq=False)
class Findings:
    """What passes of one model have shown; each is found out once.

    Attributes:
        looks_ahead: tokens that were taken for equal had other hidden states: no tokens are shared any more.
        processed_logits: output layers whose model does more to logits than the layer itself (soft-capping, scaling).
        adapters: LoRA layers, and whether the fused operation gave what the layer itself gives.
        below_attention: layers whose cotangents were seen at tokens that predict nothing: all but those behind the last
            attention.
    """

    looks_ahead: bool = False
    processed_logits: set[nn.Module] = field(default_factory=set)
    adapters: dict[nn.Module, bool] = field(default_factory=dict)
    below_attention: set[nn.Module] = field(default_factory=set)


class SharedPass:
    """A forward pass over one bucket, and the backward passes through its graph."""

    def __init__(self, bucket: Bucket, findings: Findings) -> None:
        self.plan, self.findings = TokenPlan(bucket), findings
        self._differences: list[Tensor] = []

    def fits(self, x: Tensor) -> bool:
        """Whether x (n, l, d) is laid out as the bucket is, on the bucket's device."""
        return x.shape[:-1] == self.plan.shape and x.device == self.plan.place.device

    def compare(self, x: Tensor) -> None:
        """Hold tokens of a layer's input x (n, l, d) that the plan takes for equal against each other."""
        self._differences += disagreement(x.detach(), self.plan)

    def agrees(self) -> bool:
        """After the pass: whether all tokens that were taken for equal were. If not, the numbers of this pass are wrong, and the
        model's passes share no tokens from now on.
        """
        # one synchronisation with the device a pass, and not one a layer
        if self._differences and bool(torch.stack([d.cpu() for d in self._differences]).max() > 0):
            self.findings.looks_ahead = True
        return not self.findings.looks_ahead


class Cotangents:
    """The cotangents of a layer's outputs, those that are 0 left out where that is worthwhile.

    Args:
        layer: the layer.
        current: the pass.
        dy: (n, l, out) cotangents.
        inputs: the layer's number of inputs, which the products are as wide as.

    Attributes:
        part: (tokens, out), those to multiply. Products are written by the caller into `room` and separated by `spread`.
    """

    def __init__(self, layer: nn.Module, current: SharedPass, dy: Tensor, inputs: int) -> None:
        plan, flat = current.plan, dy.flatten(0, 1)
        tokens, slots = _with_cotangent(layer, current, flat)
        left_out = plan.worthwhile(tokens, flat.shape[1], inputs)
        self._plan, self._slots = plan, slots if left_out else None
        self.part = flat.index_select(0, tokens) if left_out else flat

    def room(self, width: int) -> tuple[Tensor, Tensor]:
        """Uninitialised memory for products.

        Returns:
            (tokens or one more, width), where the last row is zero if tokens are left out, which `spread` copies for them; and
            its first (tokens, width), to be filled.
        """
        count = len(self.part)
        if self._slots is None:
            room = self.part.new_empty((count, width))
            return room, room
        room = self.part.new_empty((count + 1, width))
        room[count] = 0
        return room, room[:count]

    def spread(self, room: Tensor) -> Tensor:
        """A filled room -> (n, l, width)."""
        products = room if self._slots is None else room.index_select(0, self._slots)
        return products.view(*self._plan.shape, -1)


def _with_cotangent(layer: nn.Module, current: SharedPass, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of dy (n * l, out) with a cotangent, and where among them each token finds its product (plan.seen_slots)."""
    plan, known = current.plan, current.findings.below_attention
    if layer not in known:
        if not bool(dy.index_select(0, plan.others).any()):
            return plan.predicting, plan.predicting_slots
        known.add(layer)
    return plan.seen, plan.seen_slots
