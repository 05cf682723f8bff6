"""Models whose weights torch's `fully_shard` (FSDP2) has cut over processes.

    process p holds the stretch  theta_p  of the first dimension of every parameter, and of every vector over parameters
    (gradients, moments, P, steps, rows) the same stretch
    <a, b> = sum_p <a_p, b_p>            K(t, i) = sum_p dS_t,p^T diag(P_p) dS_i,p

Every process passes every sequence: a forward or backward pass gathers weights module by module, and what it finds of inputs and
cotangents is the same everywhere, so that each forms the rows of its own stretches and no row travels. What is a sum over
parameters is summed over processes where it is finished. All make the same calls in the same order.

    with weights_cut(model):  ...           trainable_parameters(model) are this process's stretches, as plain tensors

Source: docs/decisions/0017-a-model-cut-over-processes.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.processes import Processes


@dataclass(frozen=True)
class Cut:
    """model: cut by fully_shard. spread: its parameters by name, as torch holds them (DTensors); own: this process's stretch of
    each, sharing their memory; stretches: where it lies in the first dimension. processes: who hold the others.
    """

    model: nn.Module
    processes: Processes
    spread: Mapping[str, nn.Parameter]
    own: Mapping[str, nn.Parameter]
    stretches: Mapping[str, slice]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> own stretch of every parameter that requires a gradient."""
        return {name: self.own[name] for name, p in self.spread.items() if p.requires_grad}

    def give_back(self) -> None:
        """Let go of weights that a pass has gathered: they are those from before a move."""
        _give_back(self.model)

    def total(self, value: Tensor) -> Tensor:
        """Sum over processes, on the tensor's own device."""
        device = next(iter(self.own.values())).device
        return self.processes.sum(value.to(device)).to(value.device)

    def gathered(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor of one parameter's shape, from everybody's stretch of it."""
        from torch.distributed.tensor import DTensor

        p: Any = self.spread[name]
        whole = DTensor.from_local(
            part.contiguous(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        return whole.full_tensor()

    def gradients(
        self, objective: Tensor, parameters: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """As torch.autograd.grad of own stretches (and of other leaves), None for those that were not used.

        Autograd knows the gathered weights alone: torch reduces their gradients to the stretches as it does for an optimizer. All
        processes pass the same sequences, so that the mean which it takes is each one's. `.grad` is as before.
        """
        names = {id(p): name for name, p in self.own.items()}
        leaves = [self.spread[names[id(p)]] if id(p) in names else p for p in parameters]
        before = {name: (p, p.grad) for name, p in self.spread.items() if p.requires_grad}
        others = [(p, p.grad) for p in leaves if all(p is not held for held, _ in before.values())]
        for p, _ in (*before.values(), *others):
            p.grad = None
        try:
            torch.autograd.backward(objective, retain_graph=retain_graph)
            return tuple(None if p.grad is None else _own_part(p.grad) for p in leaves)
        finally:
            for p, gradient in (*before.values(), *others):
                p.grad = gradient


_OPEN: ContextVar[Cut | None] = ContextVar("weights_cut", default=None)


def is_cut(model: nn.Module) -> bool:
    """Whether weights of the model are in part in other processes."""
    return any(type(p.data).__name__ == "DTensor" for p in model.parameters()) or any(
        hasattr(module, "reshard") for module in model.modules()
    )


def open_cut(model: nn.Module | None = None) -> Cut | None:
    """The cut that is open, of this model where one is given; None where there is none."""
    cut = _OPEN.get()
    return cut if cut is None or model is None or cut.model is model else None


def refuse_unopened(model: nn.Module) -> None:
    """Raises ValueError where the model is cut over processes and `weights_cut` is not open on it."""
    if open_cut(model) is None and is_cut(model):
        raise ValueError(
            "the model's weights are cut over processes by FSDP: gradients are taken inside "
            "entropy_core.cut_weights.weights_cut(model)"
        )


@contextmanager
def weights_cut(model: nn.Module, processes: Processes | None = None) -> Iterator[Cut]:
    """Inside, whatever takes gradients of the model works on this process's stretches of its weights.

    Args:
        model: after `fully_shard`, over one group of processes. From here on its inner modules give gathered weights back after
            a forward pass, and the outermost keeps its own.
        processes: the same group, where its members wait for one another longer than the group's own timeout; by default the
            mesh's own.

    Raises:
        ValueError: a model that is not cut, or otherwise than along the first dimension of every parameter over one group.
    """
    if not hasattr(model, "set_reshard_after_forward"):
        raise ValueError("the model is not cut over processes: apply torch.distributed.fsdp.fully_shard to it first")
    outer: Any = model
    outer.set_reshard_after_forward(True)
    outer.set_reshard_after_forward(False, recurse=False)  # `outermost_gathered` gives these back
    _give_back(model)
    spread = dict(model.named_parameters())
    own, stretches = {}, {}
    for name, p in spread.items():
        own[name], stretches[name] = _stretch(name, p)
    mesh: Any = next(iter(spread.values()))
    cut = Cut(model, processes or Processes(mesh.device_mesh.get_group()), spread, own, stretches)
    if cut.processes.size != mesh.device_mesh.size():
        raise ValueError(f"the weights are cut over {mesh.device_mesh.size()} processes, not over {cut.processes.size}")
    with _opened(cut):
        yield cut


@contextmanager
def cut_on_paper(model: nn.Module, processes: int) -> Iterator[Cut]:
    """Inside, the model's passes form the rows of the first of so many processes; nothing is cut and nobody is asked. For
    counting operations on the meta device.
    """
    spread = dict(model.named_parameters())
    ends = {name: -(-p.shape[0] // processes) for name, p in spread.items()}
    own = {name: nn.Parameter(p.detach()[: ends[name]], p.requires_grad) for name, p in spread.items()}
    with _opened(Cut(model, Processes(), spread, own, {name: slice(0, end) for name, end in ends.items()})) as cut:
        yield cut


@contextmanager
def _opened(cut: Cut) -> Iterator[Cut]:
    token = _OPEN.set(cut)
    try:
        yield cut
    finally:
        _OPEN.reset(token)


@contextmanager
def outermost_gathered(model: nn.Module) -> Iterator[None]:
    """Inside, weights of the outermost module (the output layer's, as a rule) are whole, where the model is cut and open."""
    cut = open_cut(model)
    outer: Any = None if cut is None else cut.model
    if not hasattr(outer, "unshard"):
        yield
        return
    outer.unshard()
    try:
        yield
    finally:
        outer.reshard()


def total(value: Tensor) -> Tensor:
    """A sum over parameters, over those of all processes: `value` itself where no cut is open."""
    cut = _OPEN.get()
    return value if cut is None else cut.total(value)


def total_of(*values: float) -> tuple[float, ...]:
    """`total` of numbers, in float64."""
    if _OPEN.get() is None:
        return values
    return tuple(total(torch.tensor(values, dtype=torch.float64)).tolist())


def norm_of_parts(norm: float) -> float:
    """Norm of a vector over parameters, of which `norm` is that of this process's stretches."""
    return norm if _OPEN.get() is None else total_of(norm**2)[0] ** 0.5


def any_of(values: Sequence[bool]) -> list[bool]:
    """Of each, whether it holds of anybody's stretch."""
    return [found > 0 for found in total_of(*map(float, values))] if values else []


def objective_gradients(
    objective: Tensor, parameters: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of leaves, None for those that were not used: torch.autograd.grad, or `Cut.gradients`."""
    cut = _OPEN.get()
    if cut is None:
        return torch.autograd.grad(objective, list(parameters), retain_graph=retain_graph, allow_unused=True)
    asked = {id(p) for p in parameters}
    # An objective that is made of hidden states passes by the outermost module's output, whose cotangent would have torch gather
    # its weights; without them the way back would read freed memory.
    with outermost_gathered(cut.model):
        if any(id(p) in asked for p in cut.own.values()):
            return cut.gradients(objective, parameters, retain_graph)
        return torch.autograd.grad(objective, list(parameters), retain_graph=retain_graph, allow_unused=True)


def _give_back(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _own_part(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _stretch(name: str, p: Any) -> tuple[nn.Parameter, slice]:
    if type(p.data).__name__ != "DTensor":
        raise ValueError(f"{name!r} is not cut over processes while others are: apply fully_shard to the whole model")
    if p.device_mesh.ndim != 1 or not (len(p.placements) == 1 and p.placements[0].is_shard(0)):
        raise ValueError(
            f"{name!r} is laid out as {p.placements} over {p.device_mesh.ndim} dimensions of processes: only a cut along the "
            "first dimension over one group is known (no tensor parallelism, no replicas)"
        )
    part = p.to_local().detach()
    size = -(-p.shape[0] // p.device_mesh.size())
    start = min(size * p.device_mesh.get_local_rank(), p.shape[0])
    if part.shape != (min(size, p.shape[0] - start), *p.shape[1:]):
        raise ValueError(f"the stretch of {name!r} here is {tuple(part.shape)}, which fully_shard would not make")
    return nn.Parameter(part, requires_grad=p.is_floating_point()), slice(start, start + part.shape[0])
