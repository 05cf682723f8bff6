"""Frozen linear layers that multiply each distinct token once: prompts that sequences share, and no padding.

In a causal model the hidden states of a token depend on the tokens before it and on nothing else, so that sequences with
equal beginnings (the completions of one prompt) have equal hidden states there, in every layer. A frozen layer y = x W^T
multiplies these once and copies the products. In the backward pass they are separate again: the cotangent at a shared token is
its own sequence's, which gradient rows need; only tokens whose cotangents are zero are left out (padding, the last token, and
in the last layer all that predict nothing).

Numbers are those of the ordinary pass but for rounding. That sequences do agree where their tokens do is checked at every
layer of every pass, on the last shared token of every sequence; a model where they do not (one that looks ahead) is passed
the ordinary way. Where no sequences share a beginning there is nothing to compare, and causality is taken for granted, as it
is for padding everywhere in this library. Source: docs/theory/fisher-kernel.md, "What a row costs".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from entropy_core.passes.shared_pass import Cotangents, SharedPass


def compact(layer: nn.Linear, x: Tensor, current: SharedPass) -> Tensor:
    """The output (n, l, out) of a frozen linear layer on x (n, l, d), each distinct token multiplied once."""
    current.compare(x)
    return _CompactLinear.apply(x, layer, current)


class _CompactLinear(torch.autograd.Function):
    """x (n, l, d) -> x W^T + b (n, l, out) for frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, current: SharedPass) -> Tensor:
        ctx.save_for_backward(layer.weight)
        ctx.layer, ctx.current, ctx.plan = layer, current, current.plan
        tokens = ctx.plan.gather(x, layer.in_features, layer.out_features)
        return ctx.plan.spread(functional.linear(tokens, layer.weight, layer.bias))

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        """Along one direction of the parameters, tokens with equal beginnings move alike."""
        moved = ctx.plan.gather(dx, ctx.layer.in_features, ctx.layer.out_features)
        return ctx.plan.spread(functional.linear(moved, ctx.layer.weight))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dy = Cotangents(ctx.layer, ctx.current, cotangents[0], weight.shape[1])
        dx, filled = dy.room(weight.shape[1])
        torch.mm(dy.part, weight, out=filled)
        return dy.spread(dx), None, None
