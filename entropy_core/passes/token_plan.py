"""Which tokens of a bucket a frozen layer must multiply: each distinct one once forward, those with a cotangent backward.

In a causal model the hidden states of a token depend on the tokens before it and on nothing else, so that sequences with
equal beginnings (the completions of one prompt) have equal hidden states there, in every layer. Source:
docs/theory/fisher-kernel.md, "What a row costs".
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_core.batch import Bucket

# Multiplications that take as long as copying one number.
COPYING = 64


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

    def gather(self, values: Tensor, width: int, out: int) -> Tensor:
        """(n, l, d) -> (tokens, d): the tokens to multiply forward, in a layer of `width` inputs and `out` outputs."""
        flat = values.flatten(0, 1)
        return flat.index_select(0, self.distinct) if self.worthwhile(self.distinct, width, out) else flat

    def spread(self, products: Tensor) -> Tensor:
        """(tokens, out) of what `gather` gave -> (n, l, out)."""
        if len(products) != len(self.place):
            products = products.index_select(0, self.place)
        # Not a view: what a custom operation returns may be overwritten by the model (AdaLoRA adds to it in place).
        return torch.ops.aten._unsafe_view.default(products, [*self.shape, products.shape[-1]])

    def worthwhile(self, tokens: Tensor, width: int, out: int) -> bool:
        """Whether a layer of `width` inputs and `out` outputs should multiply `tokens` alone."""
        return pays(self.shape[0] * self.shape[1], len(tokens), width, out)


def pays(total: int, count: int, width: int, out: int) -> bool:
    """Whether multiplying `count` of `total` tokens saves more than it costs to copy their inputs, and outputs to all."""
    return (total - count) * width * out > COPYING * (count * width + total * out)


def _slots(chosen: Tensor) -> Tensor:
    """(n * l,): the number of each chosen token among the chosen; the count of these for all others."""
    chosen = chosen.flatten()
    return torch.where(chosen, chosen.cumsum(0) - 1, chosen.sum())


def _first_with_equal_beginning(ids: Tensor, ends: Tensor) -> Tensor:
    """(n, l): the first row whose tokens up to and at this column are those of this row; past a row's end, the row itself."""
    n, length = ids.shape
    ids = ids.masked_fill(torch.arange(length) >= ends[:, None], -1)
    order = sorted(range(n), key=ids.tolist().__getitem__)
    in_order = ids[order]
    equal = ((in_order[1:] == in_order[:-1]) & (in_order[1:] >= 0)).long().cumprod(1).bool()  # as the one before it
    out = torch.arange(n)[:, None].expand(n, length).clone()
    for place in equal[:, 0].nonzero()[:, 0].tolist():
        before, row = order[place], order[place + 1]
        out[row] = torch.where(equal[place], out[before], row)
    return out


def disagreement(x: Tensor, plan: TokenPlan) -> list[Tensor]:
    """One number above 0 where two tokens of x (n, l, d) with equal beginnings differ by more than rounding explains; none
    where no two have equal beginnings.
    """
    if len(plan.checked) == 0:
        return []
    flat = x.flatten(0, 1)
    left, right = flat[plan.checked], flat[plan.against]
    # eps^0.6: 7e-5 in float32, 5e-2 in bfloat16
    allowed = torch.finfo(x.dtype).eps ** 0.6 * right.abs().amax()
    return [((left - right).abs().amax() - allowed).float()]
