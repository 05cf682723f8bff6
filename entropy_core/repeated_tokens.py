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

# Multiplications that take as long as copying one number: a product of a layer of that width is as cheap to make as to copy.
COPYING = 64

_looks_ahead: WeakSet[nn.Module] = WeakSet()
# Layers whose cotangents were seen at tokens that predict nothing: all but those behind the last attention.
_below_attention: WeakSet[nn.Module] = WeakSet()


class TokenPlan:
    """Which tokens of a bucket of n rows and l columns are multiplied. Indices count through the rows, n * l tokens.

    distinct: (u,) tokens to multiply forward. place: (n * l,) where among them each token finds its own product.
    seen: (s,) tokens that a completion token sees: those with a cotangent. predicting: of `seen`, those whose hidden states
    become logits, and the others. seen_slots, predicting_slots: (n * l,) where among those each token finds its product,
    one past the last for tokens that have none. checked, against: tokens that must have equal hidden states.
    """

    def __init__(self, bucket: Bucket) -> None:
        ids = bucket.input_ids.cpu()
        n, length = ids.shape
        rows, positions = bucket.rows.cpu(), bucket.positions.cpu()
        ends = torch.zeros(n, dtype=torch.long).scatter_reduce_(0, rows, positions + 1, "amax")
        columns = torch.arange(length)
        seen = columns < ends[:, None]
        first = _first_with_equal_beginning(ids, ends)
        own = seen & (first == torch.arange(n)[:, None])
        numbers = torch.full((n, length), -1).masked_scatter_(own, torch.arange(int(own.sum())))
        place = torch.where(seen, numbers[first, columns], 0)
        predicting = torch.zeros_like(seen)
        predicting[rows, positions] = True
        shared = (seen & ~own).sum(1)  # a row shares its beginning
        sharing = (shared > 0).nonzero()[:, 0]
        last = shared[sharing] - 1
        flat = torch.arange(n * length).view(n, length)

        def on_device(found: Tensor) -> Tensor:
            return found.to(bucket.input_ids.device)

        self.shape = (n, length)
        self.distinct, self.place, self.seen = (on_device(t) for t in (flat[own], place.flatten(), flat[seen]))
        self.predicting, self.others = on_device(flat[predicting]), on_device(flat[seen & ~predicting])
        self.seen_slots, self.predicting_slots = on_device(_slots(seen)), on_device(_slots(predicting))
        self.checked, self.against = on_device(flat[sharing, last]), on_device(flat[first[sharing, last], last])

    def worthwhile(self, tokens: Tensor, width: int) -> bool:
        """Whether multiplying `tokens` alone saves more than copying costs, in a layer with `width` inputs to a product."""
        total = self.shape[0] * self.shape[1]
        return (total - len(tokens)) * width > total * COPYING


def _slots(chosen: Tensor) -> Tensor:
    """(n * l,): the number of each chosen token among the chosen; the count of these for all others."""
    chosen = chosen.flatten()
    return torch.where(chosen, chosen.cumsum(0) - 1, chosen.sum())


def _first_with_equal_beginning(ids: Tensor, ends: Tensor) -> Tensor:
    """(n, l): the first row whose tokens up to and at this column are those of this row; past a row's end, the row itself."""
    n, length = ids.shape
    ids = ids.masked_fill(torch.arange(length) >= ends[:, None], -1)
    order = sorted(range(n), key=ids.tolist().__getitem__)
    out = torch.empty_like(ids)
    out[order[0]] = order[0]
    for before, row in zip(order, order[1:], strict=False):
        equal = ((ids[row] == ids[before]) & (ids[row] >= 0)).long().cumprod(0).bool()
        out[row] = torch.where(equal, out[before], row)
    return out


@contextmanager
def repeated_tokens_once(model: nn.Module, bucket: Bucket) -> Iterator[Callable[[], bool]]:
    """Inside, a forward pass over `bucket` multiplies in frozen linear layers as the plan says, where that is worthwhile.

    Yields a function that says, after the pass, whether tokens that were taken for equal were: if not, its numbers are wrong,
    and the model is passed the ordinary way from now on.
    """
    # Rows that hold several completions share their prompt already, and under autocast the products have other types.
    ordinary = bucket.attention_mask is not None or torch.is_autocast_enabled(bucket.input_ids.device.type)
    modules = [] if ordinary or model in _looks_ahead else model.modules()
    layers = [module for module in modules if isinstance(module, nn.Linear) and _is_plain(module)]
    if not layers:
        yield lambda: True
        return
    plan = TokenPlan(bucket)
    differences: list[Tensor] = []
    for layer in layers:
        layer.forward = _compact_forward(layer, plan, differences)

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


def _is_plain(module: nn.Linear) -> bool:
    """Whether the module is a frozen y = x W^T + b and nothing else, with its whole W at hand."""
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return False
    tensors = [t for t in module._parameters.values() if t is not None]
    return all(not t.requires_grad and type(t) is nn.Parameter and t.device.type != "meta" for t in tensors)


def _compact_forward(layer: nn.Linear, plan: TokenPlan, differences: list[Tensor]) -> Any:
    def forward(input: Tensor) -> Tensor:  # noqa: A002 - torch's own name, which callers may use
        if input.shape[:-1] != plan.shape or input.device != plan.place.device:
            return nn.Linear.forward(layer, input)
        differences.append(_disagreement(input.detach().flatten(0, 1), plan))
        return _CompactLinear.apply(input, layer, plan)

    return forward


def _disagreement(x: Tensor, plan: TokenPlan) -> Tensor:
    """Above 0 where two tokens with equal beginnings differ by more than rounding explains."""
    if len(plan.checked) == 0:
        return x.new_zeros(())
    left, right = x[plan.checked], x[plan.against]
    # eps^0.6: 7e-5 in float32, 5e-2 in bfloat16
    allowed = torch.finfo(x.dtype).eps ** 0.6 * right.abs().amax()
    return ((left - right).abs().amax() - allowed).float()


def _products(x: Tensor, layer: nn.Linear, plan: TokenPlan, bias: Tensor | None) -> Tensor:
    """(n, l, out): x W^T + bias, of distinct tokens and copied where that is cheaper."""
    if not plan.worthwhile(plan.distinct, layer.in_features):
        return functional.linear(x, layer.weight, bias)
    products = functional.linear(x.flatten(0, 1).index_select(0, plan.distinct), layer.weight, bias)
    return products.index_select(0, plan.place).view(*plan.shape, -1)


class _CompactLinear(torch.autograd.Function):
    """x (n, l, d) -> x W^T + b (n, l, out) for frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, plan: TokenPlan) -> Tensor:
        ctx.save_for_backward(layer.weight)
        ctx.layer, ctx.plan = layer, plan
        return _products(x, layer, plan, layer.bias)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        """Along one direction of the parameters, tokens with equal beginnings move alike."""
        return _products(dx, ctx.layer, ctx.plan, None)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        layer, plan, dy = ctx.layer, ctx.plan, cotangents[0].flatten(0, 1)
        (weight,) = ctx.saved_tensors
        tokens, slots = plan.seen, plan.seen_slots
        if layer not in _below_attention:
            if bool(dy.index_select(0, plan.others).any()):
                _below_attention.add(layer)
            else:
                tokens, slots = plan.predicting, plan.predicting_slots
        if not plan.worthwhile(tokens, layer.out_features):
            return (dy @ weight).view(*plan.shape, -1), None, None
        products = dy.new_empty((len(tokens) + 1, weight.shape[1]))
        torch.mm(dy.index_select(0, tokens), weight, out=products[:-1])
        products[-1] = 0
        return products.index_select(0, slots).view(*plan.shape, -1), None, None
