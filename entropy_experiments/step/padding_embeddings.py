"""Entries of padding tokens' embeddings that training never moves: torch gives them no gradient (`nn.Embedding(padding_idx)`).

Rows of a kernel are true derivatives, and these entries are among them where the policy reads the token. An optimizer that
never saw a gradient of an entry takes 1/eps for it, but the entry stays where it is: its share of any step is 0, and so is P.
Where the embedding is tied to the output layer, the entry is moved through that, and P is what the moments say.

Source: docs/theory/fisher-kernel.md, "Padding tokens".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from entropy_core.adamw import AdamWParameterState
from entropy_core.cut_weights import open_cut
from entropy_core.formed import Formed


def hold_unmoved_padding(
    model: nn.Module, state: Mapping[str, AdamWParameterState], p: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """P with (next to) nothing for entries of padding embeddings whose second moment is 0; formed when it is read."""
    padding: dict[str, list[tuple[slice | int, ...]]] = {}
    for name, entries in _padding_entries(model):
        padding.setdefault(name, []).append(entries)

    def form(name: str) -> Tensor:
        own = p[name]
        if name in padding:
            own = own.clone()
            for entries in padding[name]:
                unmoved = state[name].exp_avg_sq[entries] == 0
                # a preconditioner is positive
                own[entries] = torch.where(unmoved, torch.finfo(own.dtype).tiny, own[entries])
        return own

    return Formed(p, form)


def _padding_entries(model: nn.Module) -> Iterator[tuple[str, tuple[slice | int, ...]]]:
    """(parameter's name, index of its entries)."""
    cut = open_cut(model)
    if cut is not None:
        cut.give_back()
    names = {id(q): name for name, q in model.named_parameters() if q.requires_grad}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in names:
            name, start = names[id(module.weight)], 0
            if cut is not None:
                start = cut.stretches[name].start
                if not start <= module.padding_idx < cut.stretches[name].stop:
                    continue
            yield name, (module.padding_idx - start,)
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Embedding) and base.padding_idx is not None:
            for factor in getattr(module, "lora_embedding_A", {}).values():  # (r, vocabulary)
                if id(factor) in names:
                    yield names[id(factor)], (slice(None), base.padding_idx)
