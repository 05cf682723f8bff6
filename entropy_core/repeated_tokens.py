"""Frozen linear layers that multiply each distinct token once: prompts that sequences share, and no padding.

In a causal model the hidden states of a token depend on the tokens before it and on nothing else, so that sequences with
equal beginnings (the completions of one prompt) have equal hidden states there, in every layer. A frozen layer y = x W^T
multiplies these once and copies the products. Backward they are told apart again: the cotangent at a shared token is its own
sequence's, which gradient rows need; only tokens whose cotangents are zero are left out (padding, the last token, and in the
last layer all that predict nothing).

Numbers are those of the ordinary pass but for rounding. That sequences do agree where their tokens do is checked at every
layer of every pass, on the last shared token of every sequence; a model where they do not (one that looks ahead) is passed
the ordinary way. Where no sequences share a beginning there is nothing to compare, and causality is taken for granted, as it
is for padding everywhere in this library. Source: docs/theory/fisher-kernel.md, "What a row costs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional

from entropy_core.adapter_layers import adapter_forward, is_adapter, is_frozen_linear
from entropy_core.batch import Bucket
from entropy_core.token_plan import Cotangents, TokenPlan, disagreement

_looks_ahead: WeakSet[nn.Module] = WeakSet()


@contextmanager
def repeated_tokens_once(model: nn.Module, bucket: Bucket) -> Iterator[Callable[[], bool]]:
    """Inside, a forward pass over `bucket` multiplies in frozen linear layers as the plan says, where that is worthwhile.

    Yields a function that says, after the pass, whether tokens that were taken for equal were: if not, its numbers are wrong,
    and the model is passed the ordinary way from now on.
    """
    # Rows that hold several completions share their prompt already, and under autocast the products have other types.
    ordinary = bucket.attention_mask is not None or torch.is_autocast_enabled(bucket.input_ids.device.type)
    modules = [] if ordinary or model in _looks_ahead else model.modules()
    layers: dict[Any, Callable] = {}
    for module in modules:
        if is_adapter(module):
            layers[module] = adapter_forward
        elif is_frozen_linear(module):
            layers[module] = _compact_forward
    if not layers:
        yield lambda: True
        return
    plan = TokenPlan(bucket)
    differences: list[Tensor] = []
    for layer, stand_in in layers.items():
        layer.forward = stand_in(layer, plan, differences)

    def agree() -> bool:
        if not differences or not bool(torch.stack([d.cpu() for d in differences]).max() > 0):
            return True
        _looks_ahead.add(model)
        return False

    try:
        yield agree
    finally:
        for layer in layers:
            del layer.forward


def _compact_forward(layer: nn.Linear, plan: TokenPlan, differences: list[Tensor]) -> Any:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, which callers may use
        if input.shape[:-1] != plan.shape or input.device != plan.place.device:
            return nn.Linear.forward(layer, input)
        differences.append(disagreement(input.detach().flatten(0, 1), plan))
        return _CompactLinear.apply(input, layer, plan)

    return forward


class _CompactLinear(torch.autograd.Function):
    """x (n, l, d) -> x W^T + b (n, l, out) for frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, plan: TokenPlan) -> Tensor:
        ctx.save_for_backward(layer.weight)
        ctx.layer, ctx.plan = layer, plan
        return plan.spread(functional.linear(plan.gather(x, layer.in_features), layer.weight, layer.bias))

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        """Along one direction of the parameters, tokens with equal beginnings move alike."""
        return ctx.plan.spread(functional.linear(ctx.plan.gather(dx, ctx.layer.in_features), ctx.layer.weight))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dy = Cotangents(ctx.layer, ctx.plan, cotangents[0])
        dx = dy.room(weight.shape[1])
        torch.mm(dy.part, weight, out=dx[: len(dy.part)])
        return dy.spread(dx), None, None
