"""Operations and bytes of the passes of an analysis, counted on the meta device: the kernel's own hooks, nothing computed.

Counted are one forward pass of one sequence with its head at completion tokens, a backward pass a kind of row through the hooks
that form rows (entropy_core.passes.gradient_hooks), the bytes that its graph keeps, and those of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from entropy_core.batch import Bucket
from entropy_core.cut_weights import cut_on_paper
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.forward import call_model, evaluation_mode, output_layer
from entropy_core.passes.gradient_hooks import RowHooks
from entropy_core.passes.logits import logprobs_and_entropies


@dataclass(frozen=True)
class PassCosts:
    """Of one sequence. forward, backward: floating-point operations, the latter for one kind of row with its formation.

    graph_bytes: what the forward pass keeps for the backward one, logits aside (they are chunked). row_bytes: of one row.
    weight_bytes: of the model as it is loaded. parameters: that rows are formed of; largest: of these in one tensor.
    """

    tokens: int
    forward: int
    backward: int
    graph_bytes: int
    row_bytes: int
    weight_bytes: int
    parameters: int
    largest: int


def count_passes(
    model: nn.Module, prompt: int, completion: int, kept: set[str] | None = None, processes: int = 1
) -> PassCosts:
    """Count one sequence of `prompt` and `completion` tokens.

    Args:
        model: On the meta device, its trained parameters requiring gradients.
        prompt: Tokens of the prompt, at least 1.
        completion: Tokens that the policy drew.
        kept: Names of the parameters that rows are formed of; None: all trained ones.
        processes: Over how many the model is cut: rows, parameters and largest are then those of one, and so are weight_bytes.
    """
    if processes > 1:
        with cut_on_paper(model, processes) as cut:
            held = sum(p.numel() * p.element_size() for p in cut.own.values())
            return replace(count_passes(model, prompt, completion, kept), weight_bytes=held)
    parameters = {n: p for n, p in trainable_parameters(model).items() if kept is None or n in kept}
    bucket, seen = _bucket(prompt, completion), _Graph(output_layer(model))
    formed: list[int] = []
    with evaluation_mode(model), FlopCounterMode(display=False) as counter, RowHooks(model, parameters) as hooks:
        hooks.begin(bucket)
        with saved_tensors_hooks(seen.keep, lambda tensor: tensor), _head_at(model, bucket):
            logits = call_model(model, bucket)
        logprobs, _ = logprobs_and_entropies(logits.float(), bucket.targets)
        forward = counter.get_total_flops()
        hooks.backward(logprobs.sum(), lambda _name, rows: formed.append(4 * rows.numel()), retain_graph=False)
        backward = counter.get_total_flops() - forward
    counts = [p.numel() for p in parameters.values()]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # a parameter that is used twice sends its rows twice, and they are added up
    return PassCosts(
        prompt + completion, forward, backward, seen.bytes, 4 * sum(counts), weights, sum(counts), max(counts)
    )


def short_pass(model: nn.Module) -> Callable[[], object]:
    """A forward pass of two tokens, on the meta device."""
    bucket = _bucket(1, 1)
    return lambda: call_model(model, bucket)


def _bucket(prompt: int, completion: int) -> Bucket:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device="meta")

    length = prompt + completion - 1  # the last token predicts nothing
    # The mask of rows that share a prefix: without one transformers looks at the values of positions, and there are none.
    mask = torch.ones((1, 1, length, length), dtype=torch.bool, device="meta")
    tokens = [zeros(completion) for _ in range(5)]
    return Bucket(zeros(1), zeros(1, length), *tokens, position_ids=zeros(1, length), attention_mask=mask)


class _Graph:
    """Bytes of what a graph saves, each storage once; weights and logits left out."""

    def __init__(self, head: nn.Module | None) -> None:
        self._vocabulary = 0 if head is None else int(getattr(head, "weight", torch.empty(0)).shape[0])
        self._seen: dict[int, Tensor] = {}
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        if (
            not isinstance(tensor, nn.Parameter)
            and tensor.is_leaf is False
            and not logits
            and storage not in self._seen
        ):
            self._seen[storage] = tensor
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


class _head_at:
    """The output layer sees the positions that predict completion tokens, as in the passes of an analysis."""

    def __init__(self, model: nn.Module, bucket: Bucket) -> None:
        self._layer, self._count = output_layer(model), len(bucket.targets)

    def __enter__(self) -> None:
        def cut(_module: nn.Module, args: tuple) -> tuple:
            return (args[0][0, : self._count], *args[1:])

        self._handle: Any = None if self._layer is None else self._layer.register_forward_pre_hook(cut)

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
