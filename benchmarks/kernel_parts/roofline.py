"""A kernel's matrix products counted one by one, and the time that a device's measured limits allow for them.

    FLOP of a product     2 b m k n                     b products (m, k) @ (k, n)
    bytes of a product    w b (m k + k n + m n)         each operand read once, the result written once; w bytes an element
    least time            sum over products of max(FLOP / peak FLOP rate, bytes / peak bandwidth)

Counted are the products of one pass over both sides (forward, cotangents, rows) and of the contraction. Elementwise work, the
softmax and the self-check's gradients are not, so a real run cannot reach the least time. Peaks are measured on the
device: the rate of a large square product and of a copy.

Frozen weights have no gradient product; below the first adapter nothing needs a cotangent. Symbols: N tokens of a batch of n
sequences of L tokens (without the last, which predicts nothing), m completion tokens, V vocabulary, r rank, D trainable
parameters.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_core.passes.token_plan import pays
from kernel_parts.cases import Case, random_adapters, random_batch

SHAPES: dict[str, dict[str, int]] = {
    "1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


@dataclass(frozen=True)
class Product:
    """`batch` products (m, k) @ (k, n)."""

    what: str
    batch: int
    m: int
    k: int
    n: int

    @property
    def flop(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n

    def bytes(self, width: int) -> int:
        return width * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


def linear_layers(shape: dict[str, int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of one block's linear layers: q, k, v, o, gate, up, down."""
    d, wide = shape["hidden_size"], shape["intermediate_size"]
    keys = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [(d, d), (d, keys), (d, keys), (d, d), (d, wide), (d, wide), (wide, d)]


def trainable(shape: dict[str, int], rank: int) -> int:
    """D: parameters of LoRA on all linear layers."""
    return shape["num_hidden_layers"] * sum(rank * (i + o) for i, o in linear_layers(shape))


def side_products(shape: dict[str, int], rank: int, sequences: int, length: int, completion: int) -> list[Product]:
    """One side's forward pass, cotangents and rows; n sequences of `length` tokens, `completion` of them predicted."""
    tokens, predicted = sequences * length, sequences * completion
    d, vocabulary = shape["hidden_size"], shape["vocab_size"]
    heads, width = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    found = []
    last = shape["num_hidden_layers"] - 1
    for block in range(last + 1):
        for place, (i, o) in enumerate(linear_layers(shape)):
            # behind the last attention only tokens that predict have cotangents; the others are left out where that pays
            spared = block == last and place not in (1, 2) and pays(tokens, predicted, o, i)
            seen = predicted if spared else tokens
            found += [
                Product("forward", 1, tokens, i, o),
                Product("forward", 1, tokens, i, rank),
                Product("forward", 1, tokens, rank, o),
                Product("cotangents", 1, seen, o, rank),
                Product("rows", sequences, rank, length, i),
                Product("rows", sequences, o, length, rank),
            ]
            if block or place > 2:  # what enters the first block's q, k and v depends on no adapter
                found.append(Product("cotangents", 1, seen, o, i))
                found.append(Product("cotangents", 1, seen, rank, i))
        found += [
            Product("forward", sequences * heads, length, width, length)
        ] * 2  # scores and values; masked half included
        found += [Product("cotangents", sequences * heads, length, width, length)] * 4
    found.append(Product("forward", 1, predicted, d, vocabulary))
    found.append(Product("cotangents", 1, predicted, vocabulary, d))
    return found


def kernel_products(
    shape: dict[str, int], rank: int, n_rows: int, n_columns: int, length: int, completion: int
) -> list[Product]:
    """All of K1: both sides, and the contraction (n_rows, D) @ (D, n_columns)."""
    sides = [p for n in (n_rows, n_columns) for p in side_products(shape, rank, n, length, completion)]
    return [*sides, Product("contraction", 1, n_rows, trainable(shape, rank), n_columns)]


def least_seconds(products: list[Product], flop_rate: float, bandwidth: float, width: int = 4) -> dict[str, float]:
    """Seconds for each kind of product; see the top of the file."""
    found: dict[str, float] = {}
    for p in products:
        found[p.what] = found.get(p.what, 0.0) + max(p.flop / flop_rate, p.bytes(width) / bandwidth)
    return found


def measured_peaks(device: str, size: int | None = None) -> tuple[float, float]:
    """(FLOP a second of a square float32 product, bytes a second of a copy: read and written), the best of five."""
    size = size or (8192 if device != "cpu" else 1024)
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    source = torch.empty(size * size * (16 if device != "cpu" else 8), device=device)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: a @ b, device) for _ in range(5))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() * source.element_size() / copy


def _seconds(call: Any, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def random_case(
    shape: dict[str, int], rank: int, n_rows: int, n_columns: int, prompt: int, completion: int, device: str
) -> Case:
    """Random weights and tokens; P drawn log-uniformly from 1e2 to 1e6 (its values do not matter to the time)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model = random_adapters(model, rank, seed=1).to(device)
    lengths = {"prompt": (prompt, prompt), "completion": (completion, completion)}
    rows, columns = (
        random_batch(n, shape["vocab_size"], seed, **lengths).to(device) for n, seed in ((n_rows, 3), (n_columns, 4))
    )
    p: dict[str, Tensor] = {
        name: 10 ** (2 + 4 * torch.rand(q.shape, device=device))
        for name, q in model.named_parameters()
        if q.requires_grad
    }
    return Case(model, rows, columns, p)


def run_roofline(options: argparse.Namespace, n_rows: int, n_columns: int) -> None:
    """Measure the device, count, time K1, and write roofline-<device>.json.

    The smaller side is the one that is stored (K1 of exchanged sides is the transpose): 128 x D float32 of 1.5B-class shapes
    with r = 64 are 38 GB, 256 x D would be 76.
    """
    from entropy_core.kernel import compute_cross_fisher_kernel

    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = SHAPES[options.shape]
    prompt, completion = (int(text) for text in options.tokens.split(","))
    flop_rate, bandwidth = measured_peaks(options.device)
    case = random_case(shape, options.rank, n_rows, n_columns, prompt, completion, options.device)
    sides = (case.rows, case.columns) if n_rows >= n_columns else (case.columns, case.rows)
    small = case.smallest()
    compute_cross_fisher_kernel(case.model, small.rows, small.columns, case.preconditioner)
    seconds = min(
        _seconds(lambda: compute_cross_fisher_kernel(case.model, *sides, case.preconditioner), options.device)
        for _ in range(3)
    )
    products = kernel_products(shape, options.rank, n_rows, n_columns, prompt + completion - 1, completion)
    least = least_seconds(products, flop_rate, bandwidth)
    found = {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "threads": options.threads,
        "shape": shape,
        "rank": options.rank,
        "rows": n_rows,
        "columns": n_columns,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "trainable_parameters": trainable(shape, options.rank),
        "peak_flop_per_s": flop_rate,
        "peak_bytes_per_s": bandwidth,
        "flop": sum(p.flop for p in products),
        "bytes": sum(p.bytes(4) for p in products),
        "least_seconds": least,
        "least_seconds_total": sum(least.values()),
        "measured_seconds": seconds,
        "share_of_roofline": sum(least.values()) / seconds,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"roofline-{'cpu' if options.device == 'cpu' else 'cuda'}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
