"""LoRA layers as one operation, forward and backward, with the rows of both factors.

    h = s x A^T            y  = x W^T + b + h B^T             s the adapter's scaling, W and b frozen
    u = s dy B             dx = dy W + u A
    row_t(A) = sum_l u_tl x_tl^T                row_t(B) = sum_l dy_tl h_tl^T

peft makes y from three products, one scaling and one sum, each with a tensor as large as y, and autograd goes back through
all of them. Here products are added where the first one lies, and rows come from the u and h that dx and y need anyway. Equal
tokens are multiplied once, as in entropy_core.passes.shared_tokens, factors included.

Taken for peft's own linear layer with one plain active adapter (no dropout at work, no variant such as DoRA, no bias, nothing
merged or disabled, no hooks of others inside, one dtype), and only if it gives what the layer itself gives on two tokens of
the first pass; all others go the ordinary way. Source: docs/theory/fisher-kernel.md, "What a row costs".
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from entropy_core.passes.gradient_hooks import RowHook, RowHooks
from entropy_core.passes.replaced_forward import own_forward, wrapped_by_others
from entropy_core.passes.shared_pass import Cotangents, SharedPass

_PROBE_TOKENS = 2


class PlainAdapter(NamedTuple):
    """W, b, the modules of A and B, s."""

    base: nn.Linear
    a: nn.Linear
    b: nn.Linear
    scaling: float


def owns_weight(layer: nn.Module) -> bool:
    """Whether a linear layer's weight and bias are parameters of its own, not computed from others at each use (weight or
    spectral normalisation, any of torch.nn.utils.parametrize): those may be trained although the layer holds none.
    """
    own = layer._parameters
    return own.get("weight") is not None and ("bias" in own or getattr(layer, "bias", None) is None)


def is_frozen_linear(module: nn.Module) -> bool:
    """Whether the module is a frozen y = x W^T + b and nothing else, with its whole W at hand."""
    if type(module).forward is not nn.Linear.forward or wrapped_by_others(module) or not owns_weight(module):
        return False
    tensors = [t for t in module._parameters.values() if t is not None]
    return all(not t.requires_grad and type(t) is nn.Parameter and t.device.type != "meta" for t in tensors)


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether the module is peft's own linear LoRA layer, and no subclass of it."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # a model has its layers only where it is loaded
    return peft is not None and type(module) is peft.Linear


def plain_adapter(layer: Any) -> PlainAdapter | None:
    """What `adapted` needs to stand for the module's own forward; None where it may not."""
    if not is_adapter_layer(layer) or wrapped_by_others(layer):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.disable_adapters or layer.merged:
        return None
    (name,) = names
    if name in getattr(layer, "lora_variant", {}):
        return None
    base, dropout, a, b = layer.base_layer, layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name]
    off = isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not dropout.training)
    plain = all(type(m).forward is nn.Linear.forward and not wrapped_by_others(m) and m.bias is None for m in (a, b))
    if not off or not plain or not is_frozen_linear(base) or any(_watched(m) for m in (base, dropout, a, b)):
        return None
    tensors = [t for t in (base.weight, base.bias, a.weight, b.weight) if t is not None]
    if len({(t.dtype, t.device) for t in tensors}) != 1 or base.weight.device.type == "meta":
        return None
    return PlainAdapter(base, a, b, layer.scaling[name])


def _watched(module: nn.Module) -> bool:
    """Whether somebody wants to see the module being called; our own hooks take rows where they find them."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not isinstance(hook, RowHook) for hook in module._forward_hooks.values())


def adapted(layer: nn.Module, found: PlainAdapter, x: Tensor, current: SharedPass) -> Tensor | None:
    """The output (n, l, out) of a LoRA layer on x (n, l, d) in one operation; None where the layer itself is to be called.

    found: `plain_adapter(layer)`.
    """
    agreed = current.findings.adapters
    if x.device != found.base.weight.device or agreed.get(layer) is False:
        return None
    current.compare(x)
    hooks = [hook for m in (found.a, found.b) for hook in m._forward_hooks.values() if isinstance(hook, RowHook)]
    names = {id(hook.module): hook.own["weight"] for hook in hooks}
    sends = _Sends(hooks[0].hooks, names.get(id(found.a)), names.get(id(found.b))) if hooks else None
    root = None if sends is None else sends.hooks.root
    y = _AdaptedLinear.apply(x, found.a.weight, found.b.weight, root, layer, found, current, sends)
    if layer not in agreed:
        agreed[layer] = _agrees(layer, x, y)
    return y if agreed[layer] else None


def _agrees(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the layer itself gives the same on the first tokens."""
    # the layer itself is not asked for derivatives, which would take as long as the whole pass in a small model
    with torch.no_grad(), _set_fwd_grad_enabled(False):
        expected = own_forward(layer, x[:1, :_PROBE_TOKENS].detach())
        found = y[:1, :_PROBE_TOKENS].detach()
        allowed = torch.finfo(y.dtype).eps ** 0.6 * expected.abs().amax()
        return found.dtype == expected.dtype and not bool((found - expected).abs().amax() > allowed)


class _Sends(NamedTuple):
    """Where rows go, and under which names; None for a factor whose rows nobody wants."""

    hooks: RowHooks
    a: str | None
    b: str | None


class _AdaptedLinear(torch.autograd.Function):
    """x (n, l, d), A (r, d), B (out, r), and the root of the hooks -> y (n, l, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        root: Tensor | None,
        layer: nn.Module,
        factors: PlainAdapter,
        current: SharedPass,
        sends: _Sends | None,
    ) -> Tensor:
        weight, bias, plan = factors.base.weight, factors.base.bias, current.plan
        tokens = plan.gather(x, *weight.shape[::-1])
        h = torch.mm(tokens, a.T).mul_(factors.scaling)
        y = torch.mm(tokens, weight.T) if bias is None else torch.addmm(bias, tokens, weight.T)
        y.addmm_(h, b.T)
        h = plan.spread(h)
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.save_for_forward(x, h, weight, a, b)
        ctx.set_materialize_grads(False)  # inputs of the first block do not move
        ctx.layer, ctx.scaling, ctx.current, ctx.sends = layer, factors.scaling, current, sends
        return plan.spread(y)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, da: Tensor | None, db: Tensor | None, *_: Any) -> Tensor:
        """Along one direction of x, A and B; tokens with equal beginnings move alike."""
        x, h, weight, a, b = ctx.saved_tensors
        plan, s, widths = ctx.current.plan, ctx.scaling, weight.shape[::-1]
        tokens, h = (plan.gather(value, *widths) for value in (x, h))
        dh = h.new_zeros(h.shape) if da is None else torch.mm(tokens, da.T)
        if dx is not None:
            moved = plan.gather(dx, *widths)
            dh.addmm_(moved, a.T)
            dy = torch.mm(moved, weight.T).addmm_(dh, b.T, alpha=s)
        else:
            dy = torch.mm(dh.mul_(s), b.T)
        if db is not None:
            dy.addmm_(h, db.T)
        return plan.spread(dy)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (cotangent,) = cotangents
        if cotangent is None:
            return (None,) * 8
        x, h, weight, a, b = ctx.saved_tensors
        sends = ctx.sends
        dy = Cotangents(ctx.layer, ctx.current, cotangent, weight.shape[1])
        u, own = dy.room(len(a))
        torch.mm(dy.part, b, out=own).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            products, filled = dy.room(weight.shape[1])
            torch.mm(dy.part, weight, out=filled).addmm_(own, a)
            dx = dy.spread(products)
        u = dy.spread(u)
        if sends is not None:
            if sends.a is not None:
                sends.hooks.send_whole(sends.a, sends.hooks.linear(x, u))
            if sends.b is not None:
                sends.hooks.send_whole(sends.b, sends.hooks.linear(h, cotangent))
        da = db = None
        if sends is None or sends.hooks.gradients_wanted:
            da = u.flatten(0, 1).T @ x.flatten(0, 1) if ctx.needs_input_grad[1] else None
            db = cotangent.flatten(0, 1).T @ h.flatten(0, 1) if ctx.needs_input_grad[2] else None
        visited = None if sends is None else torch.zeros_like(sends.hooks.root)
        return dx, da, db, visited, None, None, None, None
