"""Rows that are kept as factors: the same products as rows formed one sequence at a time, and none of the memory of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from entropy_core import factored_rows
from entropy_core.batch import SequenceBatch
from entropy_core.entropy import TokenCoefficients, entropy_coefficients, score_coefficients
from entropy_core.factored_rows import KeptFactors, blocks, factored_products
from entropy_core.gradients import gradient_rows, stream_rows, trainable_parameters
from entropy_core.passes.factors import EmbeddingFactors, LinearFactors, PlainRows
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from tests.live_tensors import LiveTensors
from tests.oracle.comparison import assert_close

SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied: bool, vocabulary: int = 40) -> nn.Module:
    shape = {**SHAPE, "num_key_value_heads": 1, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**shape))


def lora() -> nn.Module:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(llama(True), config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: llama(True),
    "untied": lambda: llama(False),
    "lora": lora,
    "biases": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=40, num_key_value_heads=1, **SHAPE)),
    "transposed layers, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=20, n_embd=16, n_layer=2, n_head=2)
    ),
}


def sequences(count: int, seed: int, vocabulary: int = 40) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 12, (count,), generator=generator).tolist()
    tokens = [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return SequenceBatch.from_sequences(
        [t[:3] for t in tokens], [t[3:] for t in tokens], [n // 2 for n in range(count)], 0
    )


def factors_of(model: nn.Module, batch: SequenceBatch, objectives: list[TokenCoefficients]) -> KeptFactors:
    kept = KeptFactors()
    stream_rows(model, batch, objectives, kept.add, PassSettings(40, "hooks"), kept.clear, factored=True)
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_rows_formed_one_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 by autograd, a sequence alone, without any hook; in small blocks, so that parameters are cut."""
    monkeypatch.setattr(factored_rows, "BLOCK_BYTES", 4 * 16 * 16 * 5)
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    evaluation, train = sequences(9, 1), sequences(7, 2)
    terms = entropy_coefficients(token_statistics(model, evaluation), evaluation, "rao_blackwell")
    objectives = [score_coefficients(evaluation), terms]
    shapes = {n: p.shape for n, p in trainable_parameters(model).items()}
    p = {n: 0.5 + torch.rand(shape) for n, shape in shapes.items()}
    vectors = {n: torch.randn(2, *shape) for n, shape in shapes.items()}
    columns = factors_of(model, train, [score_coefficients(train)])
    rows = factors_of(model, evaluation, objectives)
    assert len(rows.passes) > 1 and len(columns.passes) > 1, "several buckets"
    found = factored_products(rows, 2, columns, [0, 1], shapes, p, vectors)

    alone = PassSettings(method="loop")
    right = gradient_rows(model, train, score_coefficients(train), alone)
    for number, objective in enumerate(objectives):
        left = gradient_rows(model, evaluation, objective, alone)

        def product(n: str, metric: Tensor | float, other: Tensor, left: dict[str, Tensor] = left) -> Tensor:
            return (left[n] * metric).flatten(1) @ other.double().flatten(1).T

        kernel, along = (
            sum(product(n, p[n], right[n]) for n in shapes),
            sum(product(n, 1.0, vectors[n]) for n in shapes),
        )
        assert_close(found[number, :, :7], kernel, 1e-6, f"kernel of objective {number}")
        assert_close(found[number, :, 7:], along, 1e-6, f"vectors with objective {number}")
    some = factored_products(rows, 2, columns, [1], shapes, p)
    assert not some[0].any() and torch.equal(some[1], found[1, :, :7]), "products that were not asked for are 0"


def test_a_tied_weight_has_both_uses_and_an_embedding_its_tokens_alone() -> None:
    torch.manual_seed(0)
    batch = sequences(4, 1)
    score = [score_coefficients(batch)]
    tied = factors_of(llama(True).eval(), batch, score)
    uses = tied.passes[0].uses[0, "model.embed_tokens.weight"]
    assert sorted(type(use).__name__ for use in uses) == ["EmbeddingFactors", "LinearFactors"]
    assert tied.reached("model.embed_tokens.weight") is None, "the head reaches every token"
    untied = factors_of(llama(False).eval(), batch, score)
    reached = untied.reached("model.embed_tokens.weight")
    assert reached is not None and set(reached.tolist()) <= set(batch.input_ids.unique().tolist())
    (only,) = blocks(torch.Size((40, 16)), 4, reached)
    assert isinstance(only, Tensor) and torch.equal(only, reached)


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_is_never_a_row_a_sequence(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: less than one sequence's row of the vocabulary beside P, where rows of all would be twelve."""
    torch.manual_seed(0)
    vocabulary, evaluation, train = 20_000, sequences(6, 1), sequences(6, 2)
    model = llama(tied, vocabulary).eval()
    shapes = {n: p.shape for n, p in trainable_parameters(model).items()}
    weight = 4 * vocabulary * SHAPE["hidden_size"]
    monkeypatch.setattr(factored_rows, "BLOCK_BYTES", weight // 8)
    p = {n: torch.rand(shape) for n, shape in shapes.items()}
    rows = factors_of(model, evaluation, [score_coefficients(evaluation)])
    columns = factors_of(model, train, [score_coefficients(train)])
    with LiveTensors() as counter:
        factored_products(rows, 1, columns, [0], shapes, p)
    assert counter.peak < weight


def test_rows_of_the_check_come_from_the_factors() -> None:
    """The sum and one row of each kind of use, and rows from a place on, as a store reads them."""
    torch.manual_seed(0)
    x, dy, tokens = torch.randn(3, 5, 4), torch.randn(3, 5, 6), torch.randint(0, 8, (3, 5))
    linear, embedding = LinearFactors(x, dy), EmbeddingFactors(tokens, torch.randn(3, 5, 4), 8)
    plain = PlainRows(torch.randn(3, 6))
    whole = torch.empty(3, 6, 4)
    linear.add_to(whole, slice(0, 6), fresh=True)
    assert_close(whole, torch.einsum("nto,nti->noi", dy, x), 1e-6, "linear")
    assert_close(linear.sum(), whole.sum(0), 1e-6, "sum")
    assert_close(linear.row(1), whole[1], 1e-6, "row")
    dense = torch.zeros(3, 8, 4)
    for n in range(3):
        for token, cotangent in zip(tokens[n].tolist(), embedding.cotangents[n], strict=True):
            dense[n, token] += cotangent
    assert_close(embedding.sum(), dense.sum(0), 1e-6, "sum of an embedding")
    assert_close(embedding.row(2), dense[2], 1e-6, "row of an embedding")
    for some in (slice(2, 7), torch.tensor([0, 3, 4, 7])):
        block = torch.full((3, 5 if isinstance(some, slice) else 4, 4), 7.0)
        embedding.add_to(block, some, fresh=True)
        assert_close(block, dense[:, some], 1e-6, f"{some} of an embedding")
    part = torch.empty(3, 2, 4)
    LinearFactors(x, dy[..., 3:], 3).add_to(part, slice(4, 6), fresh=True)
    assert_close(part, whole[:, 4:6], 1e-6, "from the third row on")
    vector = torch.zeros(3, 2, 1)
    PlainRows(plain.rows[:, 2:], 2).add_to(vector, slice(3, 5), fresh=False)
    assert torch.equal(vector[..., 0], plain.rows[:, 3:5])
