"""How large the factors of gradient rows are: counted by hooks on modules in one short forward pass, on any device or none.

a token             inputs and outputs of every layer whose weight has rows; an input that several layers read counts once
a predicted token   those of the output layer, which sees no others
a sequence          rows of what has no factors: norms, biases, other modules
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.passes.forward import call_model, evaluation_mode, input_device, output_layer


@dataclass(frozen=True)
class Lengths:
    """tokens, predicted: of a sequence on average, those that the policy drew apart. most, most_predicted: of the longest.
    a_pass: tokens that pass through the model at a time, with a graph.
    """

    tokens: float
    predicted: float
    most: int
    most_predicted: int
    a_pass: int

    @classmethod
    def of(cls, batch: SequenceBatch, token_batch_size: int) -> Lengths:
        """Of a batch's sequences."""
        tokens, predicted = batch.scored_lengths, batch.completion_mask.sum(1)
        largest = max(b.input_ids.numel() for b in length_buckets(batch, token_batch_size, fewest=False))
        means = float(tokens.double().mean()), float(predicted.double().mean())
        return cls(*means, int(tokens.max()), int(predicted.max()), largest)


@dataclass(frozen=True)
class FactorSizes:
    """inputs, cotangents: numbers a token; head_inputs, head_cotangents: a predicted token; plain: a sequence."""

    inputs: int
    cotangents: int
    head_inputs: int
    head_cotangents: int
    plain: int
    lengths: Lengths

    def row_bytes(self, kinds: int = 1) -> int:
        """Of a sequence of average length, `kinds` kinds of rows."""
        return self._bytes(kinds, self.lengths.tokens, self.lengths.predicted)

    def most_bytes(self, kinds: int = 1) -> int:
        """Of the longest sequence."""
        return self._bytes(kinds, self.lengths.most, self.lengths.most_predicted)

    def _bytes(self, kinds: int, tokens: float, predicted: float) -> int:
        body = tokens * (self.inputs + kinds * self.cotangents)
        head = predicted * (self.head_inputs + kinds * self.head_cotangents)
        return int(4 * (body + head + kinds * self.plain))


def factor_sizes(
    model: nn.Module, names: Collection[str], lengths: Lengths, run: Callable[[], Any] | None = None
) -> FactorSizes:
    """Sizes of the factors of these parameters' rows.

    Args:
        model: In any precision, on any device.
        names: Parameters that rows are formed of.
        lengths: Of the sequences.
        run: A forward pass of the model; None: of two tokens.
    """
    own = {id(p): p for name, p in model.named_parameters() if name in set(names)}
    head, sizes = output_layer(model), FactorSizes(0, 0, 0, 0, 0, lengths)
    seen: list[Tensor] = []  # held, so that no address is another tensor's
    parts = dict.fromkeys(("inputs", "cotangents", "head_inputs", "head_cotangents"), 0)
    factored: set[int] = set()

    def count(module: nn.Module, args: tuple, output: Any) -> None:
        linear, embedding = type(module).forward is nn.Linear.forward, type(module).forward is nn.Embedding.forward
        if not (linear or embedding) or id(module.weight) not in own:
            return
        factored.add(id(module.weight))
        prefix = "head_" if module is head else ""
        parts[f"{prefix}cotangents"] += output.shape[-1]
        if linear and not any(args[0] is tensor for tensor in seen):
            seen.append(args[0])
            parts[f"{prefix}inputs"] += args[0].shape[-1]

    owners = [m for m in model.modules() if any(id(p) in own for p in m._parameters.values() if p is not None)]
    handles = [m.register_forward_hook(count) for m in owners]
    try:
        with torch.no_grad(), evaluation_mode(model):
            (run or _short_pass(model))()
    finally:
        for handle in handles:
            handle.remove()
    plain = sum(p.numel() for at, p in own.items() if at not in factored)  # those that no module's call uses as well
    return replace(sizes, **parts, plain=plain)


def _short_pass(model: nn.Module) -> Callable[[], Any]:
    bucket, device = length_buckets(SequenceBatch.from_sequences([[0]], [[0, 0]], [0], 0))[0], input_device(model)
    mask = None if bucket.attention_mask is None else bucket.attention_mask.to(device)
    bucket = replace(bucket, input_ids=bucket.input_ids.to(device), attention_mask=mask)
    return lambda: call_model(model, bucket)
