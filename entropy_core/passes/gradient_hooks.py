"""Hooks on modules that own trainable parameters: they turn a passing cotangent into one gradient row per sequence.

A hook puts an identity operation behind its module's output y. Its backward sees dObjective/dy, forms rows and hands the
cotangent on unchanged. All these operations take one scalar `root` as a further input, and only the root's gradient is asked
of autograd: so every one of them is visited, while no weight gradient of the usual kind is computed. Where rows are wanted as
factors, inputs and cotangents are handed on instead (entropy_core.passes.factors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from entropy_core.batch import Bucket
from entropy_core.cut_weights import objective_gradients, open_cut
from entropy_core.passes.factors import EmbeddingFactors, LinearFactors, PlainRows, RowFactors
from entropy_core.passes.forward import output_layer
from entropy_core.passes.row_formation import RowsNotFormedError


class _PassingCotangent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, root: Tensor, receive: Callable[[Tensor], None], copies: bool = False
    ) -> Tensor:
        ctx.receive, ctx.root = receive, root.detach()
        return output.clone() if copies else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.receive(cotangents[0])
        return cotangents[0], torch.zeros_like(ctx.root), None, None


@dataclass(frozen=True)
class RowHook:
    """The forward hook on a module that owns parameters; own: their names in the module -> in the model."""

    hooks: RowHooks
    module: nn.Module
    path: str
    own: dict[str, str]

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return self.hooks.watch(self, args, kwargs, output)


class _Pass:
    """One forward pass with hooks.

    inputs: of every call of a hooked module, until the last backward pass has visited it: the graph, which may live on, refers to
    this object.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.inputs: dict[int, tuple[tuple, dict]] = {}
        self.calls = 0


class RowHooks:
    """Context in which modules have hooks: `begin` before each, and `backward` afterwards, for as many objectives as are
    wanted. Graphs of several passes may live side by side. copies: a module's output is copied, for models that overwrite it.
    factored: RowFactors are sent in place of rows.

    Raises RowsNotFormedError, in forward and backward passes, for parameters whose rows cannot be formed.
    """

    _pass: _Pass

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], copies: bool = False, factored: bool = False
    ) -> None:
        self._copies, self._factored = copies, factored
        cut = open_cut(model)
        if cut is not None:
            cut.give_back()  # modules own their stretches again, which are known by identity
        held = parameters if cut is None else {name: cut.spread[name] for name in parameters}
        self._names = {id(p): name for name, p in held.items()}
        self._stretches = {} if cut is None else {name: cut.stretches[name] for name in parameters}
        some = next(iter(parameters.values()))
        self.root = torch.zeros((), dtype=some.dtype, device=some.device, requires_grad=True)
        self._sink: Callable[[str, Tensor | RowFactors], None] | None = None
        self._forming_rows = False
        self._last_backward = self.gradients_wanted = False
        layer = output_layer(model)
        self._flat_modules = set(layer.modules()) if layer is not None else set()
        self._handles: list[RemovableHandle] = []
        # What hooks are made of, and not the hooks, which refer back: garbage in a cycle would keep a pass's tensors.
        self._places: list[tuple[nn.Module, str, dict[str, str]]] = []
        self._modules: dict[nn.Module, dict[str, str]] = {}
        for path, module in model.named_modules():
            own = {
                k: self._names[id(p)] for k, p in module._parameters.items() if p is not None and id(p) in self._names
            }
            if own:
                self._modules[module] = own
                self._places.append((module, path, own))
        reachable = {name for own in self._modules.values() for name in own.values()}
        missing = [name for name in parameters if name not in reachable]
        if missing:  # only a parameter held outside `_parameters`, e.g. in a plain list, can end here
            raise RowsNotFormedError(
                f"per-sequence gradients of {missing[0]!r} cannot be formed: no module owns this trainable parameter"
            )

        self._place()

    def _place(self) -> None:
        self._handles = [
            module.register_forward_hook(RowHook(self, module, path, own), with_kwargs=True)
            for module, path, own in self._places
        ]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, modules have no hooks."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self._place()

    def __enter__(self) -> RowHooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, bucket: Bucket) -> None:
        """The next pass is one over `bucket`."""
        self._pass = _Pass(bucket)

    def backward(
        self,
        objective: Tensor,
        sink: Callable[[str, Any], None],
        retain_graph: bool,
        gradients_of: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:
        """A backward pass from `objective` that sends (parameter name, (n, *shape) rows or factors) to `sink` at every hook.

        Returns autograd's own gradients of the parameters in `gradients_of`, None for those that were not used.
        """
        self._sink, self._last_backward, self.gradients_wanted = sink, not retain_graph, bool(gradients_of)
        try:
            return objective_gradients(objective, [self.root, *gradients_of], retain_graph)[1:]
        finally:
            self._sink = None

    def send_whole(self, name: str, rows: Tensor | RowFactors) -> None:
        """`send` of whole rows: of a model that is cut over processes this process's stretch of them."""
        stretch = self._stretches.get(name)
        self.send(name, rows if stretch is None or isinstance(rows, RowFactors) else rows[:, stretch])

    def send(self, name: str, rows: Tensor | RowFactors) -> None:
        """Hand on rows (n, *shape) of one use of a parameter, or their factors, during a backward pass."""
        assert self._sink is not None
        self._sink(name, rows)

    def linear(self, x: Tensor, dy: Tensor) -> Tensor | RowFactors:
        """Of y = x W^T, x (n, T, in) and dy (n, T, out): rows (n, out, in) of W, or their factors."""
        return LinearFactors(x, dy) if self._factored else torch.bmm(dy.transpose(1, 2), x.to(dy.dtype))

    def watch(self, hook: RowHook, args: tuple, kwargs: dict, output: Any) -> Any:
        """The output of a module's call, with the operation behind it that forms rows."""
        if self._forming_rows or not torch.is_grad_enabled():
            return output
        module, path, own = hook.module, hook.path, hook.own
        name = next(iter(own.values()))
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        where = f"per-sequence gradients of {name!r} cannot be formed: its module {path!r} ({type(module).__name__})"
        if len(tensors) != 1 or not args or tensors[0] is not args[0] or not isinstance(output, Tensor):
            raise RowsNotFormedError(f"{where} does not map one tensor to one tensor")
        current = self._pass
        flat = module in self._flat_modules and args[0].shape[0] == len(current.bucket.targets)
        rows, length = current.bucket.input_ids.shape
        if not flat and (args[0].shape[:2] != (rows, length) or output.shape[:2] != (rows, length)):
            raise RowsNotFormedError(
                f"{where} does not keep sequences apart: it maps {tuple(args[0].shape)} to {tuple(output.shape)} for "
                f"{rows} sequences of {length} tokens"
            )

        call = current.calls
        current.calls += 1
        current.inputs[call] = (args, kwargs)

        def receive(cotangent: Tensor) -> None:
            dy = cotangent.detach()
            args, kwargs = current.inputs.pop(call) if self._last_backward else current.inputs[call]
            x = args[0].detach().to(dy.device)  # a module's hook may have moved it there
            if flat:
                x, dy = (_unflatten(tensor, current.bucket) for tensor in (x, dy))
            try:
                found = self._rows(module, own, x, args[1:], kwargs, dy)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, TypeError) as error:  # what vmap cannot follow
                raise RowsNotFormedError(f"{where} fails on one sequence at a time ({_line(error)})") from error
            for key, rows in found.items():
                self.send(own[key], rows)

        return _PassingCotangent.apply(output, self.root, receive, self._copies)

    def _rows(
        self, module: nn.Module, own: dict[str, str], x: Tensor, rest: tuple, kwargs: dict, dy: Tensor
    ) -> Mapping[str, Tensor | RowFactors]:
        self._forming_rows = True
        stretches = {key: self._stretches[name] for key, name in own.items() if name in self._stretches}
        try:
            return self._module_rows(module, set(own), stretches, x, rest, kwargs, dy)
        finally:
            self._forming_rows = False

    def _module_rows(
        self,
        module: nn.Module,
        own: set[str],
        stretches: Mapping[str, slice],
        x: Tensor,
        rest: tuple,
        kwargs: dict,
        dy: Tensor,
    ) -> Mapping[str, Tensor | RowFactors]:
        """Rows of the module's parameters `own`; of those in `stretches` the stretch of the first dimension alone."""
        everything = slice(None)
        if type(module).forward is nn.Linear.forward:
            x, dy = x.flatten(1, -2), dy.flatten(1, -2)
            part = dy[..., stretches.get("weight", everything)]
            found = {"weight": self.linear(x, part)} if "weight" in own else {}
            part = dy[..., stretches.get("bias", everything)]
            return found | ({"bias": self._plain(part.sum(1))} if "bias" in own else {})
        if type(module).forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
            if self._factored and module.padding_idx is None:
                x, width = x.flatten(1).contiguous(), dy.shape[-1]
                return {"weight": EmbeddingFactors(x, dy.reshape(*x.shape, width), module.num_embeddings)}
            stretch = stretches.get("weight", slice(0, module.num_embeddings))
            return {"weight": self._plain(_embedding_rows(module, stretch, x, dy))}
        return {
            name: self._plain(rows[:, stretches.get(name, everything)])
            for name, rows in _vjp_rows(module, own, x, rest, kwargs, dy).items()
        }

    def _plain(self, rows: Tensor) -> Tensor | RowFactors:
        return PlainRows(rows) if self._factored else rows


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _unflatten(tensor: Tensor, bucket: Bucket) -> Tensor:
    """(m, ...) of completion tokens -> (n, most tokens of a row, ...), zero elsewhere (a zero cotangent adds nothing)."""
    if len(bucket.input_ids) == 1:  # on the meta device too, where nothing can be counted
        return tensor.unsqueeze(0)
    rows = bucket.rows.to(tensor.device)  # ascending
    counts = torch.bincount(rows, minlength=len(bucket.input_ids))
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    full = tensor.new_zeros((len(counts), int(counts.max()), *tensor.shape[1:]))
    full[rows, slots] = tensor
    return full


def _embedding_rows(module: nn.Embedding, stretch: slice, ids: Tensor, dy: Tensor) -> Tensor:
    """(n, tokens of `stretch`, width)"""
    count, width, tokens = ids.shape[0], dy.shape[-1], stretch.stop - stretch.start
    rows = dy.new_zeros((count * tokens, width))
    offsets = torch.arange(count, device=ids.device)[:, None] * tokens - stretch.start
    ids, places, dy = ids.flatten(1), (ids.flatten(1) + offsets).flatten(), dy.reshape(-1, width)
    if tokens < module.num_embeddings:
        here = ((ids >= stretch.start) & (ids < stretch.stop)).flatten()
        places, dy = places[here], dy[here]
    rows.index_add_(0, places, dy)
    rows = rows.view(count, tokens, width)
    padding = module.padding_idx
    if padding is not None and stretch.start <= padding < stretch.stop:  # torch gives the padding row no gradient
        rows[:, padding - stretch.start] = 0
    return rows


def _vjp_rows(module: nn.Module, own: set[str], x: Tensor, rest: tuple, kwargs: dict, dy: Tensor) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in module.named_parameters(recurse=False) if name in own}

    def one_sequence(x_t: Tensor, dy_t: Tensor) -> dict[str, Tensor]:
        def forward(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, values, (x_t.unsqueeze(0), *rest), kwargs)

        return torch.func.vjp(forward, parameters)[1](dy_t.unsqueeze(0))[0]

    return torch.func.vmap(one_sequence)(x, dy)
