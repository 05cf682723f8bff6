"""The longest sequence that a model's table of positions holds.

Learned positions (GPT-2, OPT) and precomputed ones (GPT-J) are rows of a table; a longer sequence ends in an index error deep
inside the model, on a GPU in the loss of the whole process. Rotary and linear-bias positions have no table and no such end.
"""

from __future__ import annotations

from torch import nn

from entropy_core.passes.forward import innermost_model

# What configurations call the table's length.
_KEYS = ("max_position_embeddings", "n_positions")
_OFFSETS = (0, 2)  # OPT and its kin leave the table's first two rows unused


def longest_sequence(model: nn.Module) -> int | None:
    """Tokens that the table holds; None for a model without one.

    The table is found by what it is: an embedding that is not the one of tokens, or a buffer of rows, as long as the
    configuration says.
    """
    limit = _said(model)
    if limit is None:
        return None
    inner = innermost_model(model)
    words = getattr(inner, "get_input_embeddings", lambda: None)()
    tokens = set() if words is None else set(words.modules())
    sizes = [m.num_embeddings for m in inner.modules() if isinstance(m, nn.Embedding) and m not in tokens]
    buffers = [b for m in inner.modules() for b in m._buffers.values() if b is not None]
    table = any(size - limit in _OFFSETS for size in sizes) or any(b.dim() == 2 and len(b) == limit for b in buffers)
    return limit if table else None


def check_length(model: nn.Module, tokens: int) -> None:
    """Raises ValueError for sequences of more tokens than the model's table of positions holds."""
    limit = _said(model)
    if limit is not None and tokens > limit and longest_sequence(model) is not None:
        raise ValueError(
            f"a sequence of {tokens} tokens does not fit into the model's table of {limit} positions: shorten prompts or "
            "completions, or take a model with a longer context"
        )


def _said(model: nn.Module) -> int | None:
    config = getattr(innermost_model(model), "config", None)
    return next((n for key in _KEYS if isinstance(n := getattr(config, key, None), int)), None)
