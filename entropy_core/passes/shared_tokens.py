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

from entropy_core.batch import Bucket
from entropy_core.passes.lora import PlainAdapter, adapter_forward, is_frozen_linear, plain_adapter
from entropy_core.passes.token_plan import Cotangents, TokenPlan, disagreement

_looks_ahead: WeakSet[nn.Module] = WeakSet()


@contextmanager
def repeated_tokens_once(model: nn.Module, bucket: Bucket) -> Iterator[Callable[[], bool]]:
    """Inside, a forward pass over `bucket` multiplies in frozen linear layers as the plan says, where that is worthwhile.

    Yields a function that says, after the pass, whether tokens that were taken for equal were: if not, its numbers are wrong,
    and the model is passed the ordinary way from now on.
    """
    # Rows that hold several completions share their prompt already, and under autocast the products have other types.
    ordinary = bucket.attention_mask is not None or torch.is_autocast_enabled(bucket.input_ids.device.type)
    layers = {} if ordinary or model in _looks_ahead else _layers(model)
    if not layers:
        yield lambda: True
        return
    plan = TokenPlan(bucket)
    differences: list[Tensor] = []
    for layer, adapter in layers.items():
        if adapter is None:
            layer.forward = _compact_forward(layer, plan, differences)
        else:
            layer.forward = adapter_forward(layer, adapter, plan, differences)

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


def _layers(model: nn.Module) -> dict[Any, PlainAdapter | None]:
    """Plain adapters, and frozen linear layers (None) outside them."""
    found: dict[Any, PlainAdapter | None] = {}
    seen, stack = set(), [model]
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        adapter = plain_adapter(module)
        if adapter is not None or is_frozen_linear(module):
            found[module] = adapter
        if adapter is None:
            stack += [child for child in module._modules.values() if child is not None]
    return found


def _compact_forward(layer: nn.Linear, plan: TokenPlan, differences: list[Tensor]) -> Any:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, which callers may use
        if input.shape[:-1] != plan.shape or input.device != plan.place.device:
            return nn.Linear.forward(layer, input)
        differences.extend(disagreement(input.detach(), plan))
        return _CompactLinear.apply(input, layer, plan)

    return forward


class _CompactLinear(torch.autograd.Function):
    """x (n, l, d) -> x W^T + b (n, l, out) for frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, plan: TokenPlan) -> Tensor:
        ctx.save_for_backward(layer.weight)
        ctx.layer, ctx.plan = layer, plan
        tokens = plan.gather(x, layer.in_features, layer.out_features)
        return plan.spread(functional.linear(tokens, layer.weight, layer.bias))

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        """Along one direction of the parameters, tokens with equal beginnings move alike."""
        moved = ctx.plan.gather(dx, ctx.layer.in_features, ctx.layer.out_features)
        return ctx.plan.spread(functional.linear(moved, ctx.layer.weight))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dy = Cotangents(ctx.layer, ctx.plan, cotangents[0], weight.shape[1])
        dx, filled = dy.room(weight.shape[1])
        torch.mm(dy.part, weight, out=filled)
        return dy.spread(dx), None, None
