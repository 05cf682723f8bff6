"""Prompts that share a row with all their completions: the numbers must be those of one sequence at a time."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.fold_gradients import fold_gradients, shared_statistics
from entropy_core.passes.shared_prefix import (
    common_prefix_buckets,
    shared_prefix_buckets,
    shares_prefixes,
    tells_of_sharing,
)
from entropy_core.scores import TokenStatistics
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_core.support import left_padded, right_padded
from tests.oracle import brute_force
from tests.oracle.comparison import assert_close, assert_named_close
from tests.oracle.model_cases import CASES, PAD_TOKEN, VOCABULARY, ModelCase, TokenLists, randomise
from tests.oracle.policy import RecurrentPolicy

KINDS = ("llama_tied", "llama_tied_lora", "qwen2_biases", "gpt2_conv1d_tied", "gpt2_conv1d_tied_lora")
TRANSFORMERS = [case for case in CASES if case.name in KINDS]
EXACT, SINGLE = 1e-10, 1e-5
# All completions of all prompts in one bucket; buckets that part prompts; rows that part one prompt's completions (a prompt
# of 5 tokens with 4 + 2 + 6 completion tokens takes 14); a row for every completion.
TOKEN_BATCH_SIZES = [4096, 30, 11, 1]
TEMPERATURE = 0.8


def groups(vocabulary: int = VOCABULARY) -> TokenLists:
    """Four prompts of one to five tokens with one to three completions each, completions of a prompt apart from each other."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    prompts = [draw(length) for length in (5, 1, 3, 2)]
    index = [0, 1, 0, 2, 3, 1, 0, 2]
    return TokenLists([prompts[p] for p in index], [draw(n) for n in (4, 3, 2, 1, 5, 4, 6, 3)], index)


@pytest.fixture(params=TRANSFORMERS, ids=lambda case: case.name)
def transformer(request: pytest.FixtureRequest) -> ModelCase:
    return request.param


def flat_statistics(batch: SequenceBatch, statistics: TokenStatistics) -> tuple[Tensor, Tensor]:
    return statistics.logprobs[batch.completion_mask], statistics.entropies[batch.completion_mask]


def one_by_one(model: nn.Module, lists: TokenLists) -> tuple[Tensor, Tensor]:
    terms = brute_force.statistics(model, lists, TEMPERATURE)
    return torch.cat([logprobs for logprobs, _ in terms]), torch.cat([entropies for _, entropies in terms])


@pytest.mark.parametrize(
    ("token_batch_size", "layout"), list(zip(TOKEN_BATCH_SIZES, [right_padded, left_padded] * 2, strict=True))
)
def test_token_statistics_are_those_of_one_sequence_at_a_time(transformer, token_batch_size: int, layout) -> None:
    model, lists = transformer.make(), groups()
    batch = layout(lists, temperature=TEMPERATURE)
    buckets = partial(shared_prefix_buckets, token_batch_size=token_batch_size)
    found = flat_statistics(batch, shared_statistics(model, batch, buckets))
    for actual, expected in zip(found, one_by_one(model, lists), strict=True):
        assert_close(actual, expected, EXACT, "a token sees another completion, or stands at another position")


def test_token_statistics_in_single_precision(transformer) -> None:
    lists = groups()
    batch = right_padded(lists, TEMPERATURE)
    found = flat_statistics(batch, shared_statistics(transformer.make(torch.float32), batch, shared_prefix_buckets))
    for actual, expected in zip(found, one_by_one(transformer.make(), lists), strict=True):
        assert_close(actual, expected, SINGLE, "float32 rows differ by more than rounding")


def rows_by_prompt(rows: dict[str, Tensor], weights: Tensor, index: list[int]) -> dict[str, Tensor]:
    """(prompts, *shape): weighted sums over each prompt's sequences, by a plain loop."""
    out = {name: torch.zeros((max(index) + 1, *row.shape[1:]), dtype=torch.float64) for name, row in rows.items()}
    for n, prompt in enumerate(index):
        for name, row in rows.items():
            out[name][prompt] += float(weights[n]) * row[n].double()
    return out


@pytest.mark.parametrize(
    ("token_batch_size", "dtype"),
    [(4096, torch.float64), (11, torch.float64), (11, torch.float32)],
    ids=["float64", "float64-many_buckets", "float32-many_buckets"],
)
def test_a_prompts_row_is_the_sum_over_its_completions(transformer, token_batch_size: int, dtype: torch.dtype) -> None:
    """Score rows with a weight a sequence, and Rao-Blackwell rows, from one forward pass; every trainable parameter."""
    lists = groups()
    reference, model = transformer.make(), transformer.make(dtype)
    batch = left_padded(lists, temperature=TEMPERATURE)
    weights = torch.linspace(-1.0, 2.0, len(batch), dtype=torch.float64)

    def objectives(statistics: TokenStatistics) -> list:
        return [score_coefficients(batch, weights), entropy_coefficients(statistics, batch, per_token=False)]

    buckets = partial(shared_prefix_buckets, token_batch_size=token_batch_size)
    scores, entropies = (found.folds for found in fold_gradients(model, batch, objectives, buckets, folds=4)[0])
    one = torch.ones(len(batch))
    tolerance = EXACT if dtype == torch.float64 else 2 * SINGLE
    for actual, rows, weight in (
        (scores, brute_force.score_rows(reference, lists, TEMPERATURE), weights),
        (entropies, brute_force.entropy_terms(reference, lists, TEMPERATURE), one),
    ):
        wanted = rows_by_prompt(rows, weight / len(batch), lists.prompt_index)
        assert_named_close(actual, wanted, tolerance, "a prompt's row is not the sum of its sequences' rows")


@pytest.mark.parametrize("token_batch_size", [4096, 11])
def test_plain_autograd_through_shared_rows_gives_the_same_gradient(transformer, token_batch_size: int) -> None:
    model, lists = transformer.make(), groups()
    batch = right_padded(lists, TEMPERATURE)
    buckets = partial(shared_prefix_buckets, token_batch_size=token_batch_size)
    (found,), _ = fold_gradients(model, batch, lambda _: [score_coefficients(batch)], buckets, folds=1)
    rows = brute_force.score_rows(model, lists, TEMPERATURE)
    wanted = {name: row.mean(0) for name, row in rows.items()}
    assert_named_close({n: f[0] for n, f in found.folds.items()}, wanted, EXACT, "gradient through shared rows")


def test_every_completion_token_stands_in_one_bucket_once_and_no_bucket_is_too_large() -> None:
    lists = groups()
    for batch in (right_padded(lists), left_padded(lists)):
        for limit in (*TOKEN_BATCH_SIZES, 16, 23):
            buckets = shared_prefix_buckets(batch, limit)
            places = torch.cat([torch.stack([b.sequences, b.columns], 1) for b in buckets])
            assert len(places) == int(batch.completion_mask.sum())
            assert torch.equal(places[places[:, 1].argsort()].unique(dim=0), batch.completion_mask.nonzero())
            for bucket in buckets:
                assert torch.equal(batch.input_ids[bucket.sequences, bucket.columns], bucket.targets)
                assert torch.equal(
                    batch.prompt_index[bucket.sequences], batch.prompt_index[bucket.indices][bucket.rows]
                )
                assert len(bucket.input_ids) == 1 or bucket.input_ids.numel() <= limit
                assert bool((bucket.rows.diff() >= 0).all()), "rows must ascend: hooks count tokens by them"
                one_completion = len(bucket.sequences.unique()) == 1
                assert one_completion or int(bucket.attention_mask.shape[-1]) <= max(limit, 5 + 6 - 1)


def test_a_prompt_passes_through_the_model_once() -> None:
    batch = right_padded(groups())
    (bucket,) = shared_prefix_buckets(batch)
    # prompts of 5, 1, 3, 2 with completions that leave out their last token: 5 + 3+1+5, 1 + 2+3, 3 + 0+2, 2 + 4
    assert sorted((bucket.attention_mask[:, 0].diagonal(dim1=1, dim2=2)).sum(1).tolist()) == [14] * 4
    assert bucket.input_ids.shape == (4, 14)


def test_equal_indices_of_unequal_prompts_do_not_share_a_row() -> None:
    """Callers may number prompts by the task's row; a template may still differ between two draws of it."""
    lists = TokenLists([[3, 4], [3, 5], [3, 4]], [[6, 7], [8, 9], [10]], [0, 0, 0])
    batch = right_padded(lists)
    (bucket,) = shared_prefix_buckets(batch)
    assert bucket.input_ids.shape[0] == 2
    model = TRANSFORMERS[0].make()
    found = flat_statistics(batch, shared_statistics(model, batch, shared_prefix_buckets))[0]
    terms = torch.cat([logprobs for logprobs, _ in brute_force.statistics(model, lists, 1.0)])
    assert_close(found, terms, EXACT, "a completion follows another prompt's tokens")


def test_models_of_attention_and_positions_share_prefixes(transformer) -> None:
    for dtype in (torch.float64, torch.float32):
        assert shares_prefixes(transformer.make(dtype), right_padded(groups(), TEMPERATURE))


class OneSequenceOnly(DistanceAttention):
    """Refuses masks of four dimensions, as several models do, each with an error of its own."""

    error: type[Exception] = ValueError

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Tensor) -> SimpleNamespace:
        if attention_mask is not None:
            raise self.error("not enough values to unpack")
        return super().forward(input_ids, **rest)


@pytest.mark.parametrize(
    ("model", "shares"),
    [
        (DistanceAttention(VOCABULARY, by_position_ids=False), True),
        (DistanceAttention(VOCABULARY, 0.5, by_position_ids=True), True),
        (DistanceAttention(VOCABULARY, 0.5, by_position_ids=False), False),
        (RecurrentPolicy(VOCABULARY), False),
        (OneSequenceOnly(VOCABULARY), False),
    ],
    ids=["attention", "distance_of_position_ids", "distance_in_the_row", "recurrent", "refuses_the_mask"],
)
def test_whether_a_model_can_is_found_out_by_trying(model: nn.Module, shares: bool) -> None:
    model.train()
    assert shares_prefixes(model, right_padded(groups())) is shares
    assert model.training, "training mode was not restored"


class AnotherWayBack(DistanceAttention):
    """Its values are right, and its derivatives run along the row, past every mask: so did a fused kernel once."""

    scale = 0.1

    def forward(self, input_ids: Tensor, **rest: Tensor) -> SimpleNamespace:
        logits = super().forward(input_ids, **rest).logits
        along = self.scale * logits.cumsum(1)
        return SimpleNamespace(logits=logits + along - along.detach())


@pytest.mark.parametrize("scale", [0.1, 0.01, 0.0])
def test_gradients_must_agree_where_log_probabilities_do(scale: float) -> None:
    model = AnotherWayBack(VOCABULARY, by_position_ids=False)
    model.scale = scale
    assert shares_prefixes(model, right_padded(groups())) is (scale == 0.0)
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    assert shares_prefixes(model, right_padded(groups())) is True, "what is not trained has no gradient to be wrong"


@pytest.mark.parametrize(
    "error", [ValueError, TypeError, RuntimeError, IndexError, AttributeError, AssertionError, KeyError]
)
def test_whatever_error_a_model_refuses_with(error: type[Exception]) -> None:
    model = OneSequenceOnly(VOCABULARY)
    model.error = error
    assert shares_prefixes(model, right_padded(groups())) is False


def test_nothing_is_shared_where_no_prompt_has_two_completions() -> None:
    lists = groups()
    batch = right_padded(lists).select([0, 1, 3, 4])
    assert len(batch.prompt_index.unique()) == 4
    assert shares_prefixes(TRANSFORMERS[0].make(), batch) is False


def test_a_recurrent_model_is_found_out_where_one_completion_stands_before_another() -> None:
    """The longest row shows nothing: its first completion has only a last token, which no row holds."""
    prompts, index = [[5, 6, 7, 8]] * 2 + [[5, 6]] * 2, [0, 0, 1, 1]
    batch = right_padded(TokenLists(prompts, [[4], [5, 6, 7], [4, 5, 6], [7, 8]], index))
    assert tells_of_sharing(batch) and tells_of_sharing(batch.select([2, 3]))
    assert shares_prefixes(RecurrentPolicy(VOCABULARY), batch) is False
    for silent in ([0, 1], [0, 2], [1, 0]):
        part = batch.select(silent)
        if silent == [1, 0]:
            part = right_padded(TokenLists(prompts[:2], [[5, 6, 7], [4]], [0, 0]))
        assert not tells_of_sharing(part), silent
        for model in (RecurrentPolicy(VOCABULARY), TRANSFORMERS[0].make()):
            assert shares_prefixes(model, part) is False, "nothing was found out, and yes was said"


def test_a_window_shorter_than_the_longest_sequence_is_seen() -> None:
    """A sliding window falls away under a mask of one's own; a short prompt alone would not show it."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MistralConfig(
            **shape, intermediate_size=24, num_key_value_heads=2, sliding_window=8, pad_token_id=None
        )
        model = MistralForCausalLM(config).eval()
    randomise(model, 1)
    short, long = [5, 6], list(range(3, 15))
    lists = TokenLists([short, short, long, long], [[7, 8, 9], [10, 9], [11, 12, 13], [14, 15]], [0, 0, 1, 1])
    assert shares_prefixes(model, right_padded(lists).select([0, 1])) is True
    assert shares_prefixes(model, right_padded(lists)) is False
    assert shares_prefixes(model, right_padded(lists).select([0, 1, 2])) is False, (
        "a lone long completion has no window"
    )


def alike(common: int, prompts: int = 4) -> TokenLists:
    """Prompts that begin with the same `common` tokens and then differ, one to three completions each, in mixed order."""
    beginning = list(range(20, 20 + common))
    lists = groups()
    index = [n % prompts for n in lists.prompt_index]
    return TokenLists(
        [[*beginning, *lists.prompt_ids[lists.prompt_index.index(p)]] for p in index], lists.completion_ids, index
    )


@pytest.mark.parametrize(("common", "prompts"), [(0, 4), (1, 4), (6, 4), (6, 1)])
@pytest.mark.parametrize(("token_batch_size", "tokens_per_row"), [(4096, 384), (30, 12)])
def test_prompts_that_begin_alike_share_their_beginning(
    common: int, prompts: int, token_batch_size: int, tokens_per_row: int
) -> None:
    lists = alike(common, prompts)
    for case, layout in ((TRANSFORMERS[0], right_padded), (TRANSFORMERS[-2], left_padded)):
        model, batch = case.make(), layout(lists, temperature=TEMPERATURE)
        buckets = partial(common_prefix_buckets, token_batch_size=token_batch_size, tokens_per_row=tokens_per_row)
        found = flat_statistics(batch, shared_statistics(model, batch, buckets))
        for actual, expected in zip(found, one_by_one(model, lists), strict=True):
            assert_close(actual, expected, EXACT, "a token sees another prompt's, or stands at another position")


def test_a_common_beginning_passes_through_the_model_once() -> None:
    batch = right_padded(alike(6))
    (bucket,) = common_prefix_buckets(batch)
    # 6 in common, then prompts of 5, 1, 3, 2 tokens, and completions without their last token
    assert bucket.input_ids.shape == (1, 6 + (5 + 1 + 3 + 2) + int(batch.completion_lengths.sum()) - 8)
    assert common_prefix_buckets(batch, tokens_per_row=1)[0].input_ids.shape[0] == 4, "at least a prompt a row"


def test_pads_that_are_tokens_elsewhere_stay_apart() -> None:
    """The pad token's id doubles as an ordinary token in prompts and completions."""
    lists = TokenLists(
        [[PAD_TOKEN, 3], [PAD_TOKEN, 3], [4]], [[PAD_TOKEN, PAD_TOKEN], [5, PAD_TOKEN, 6], [7]], [0, 0, 1]
    )
    model = TRANSFORMERS[0].make()
    for batch in (right_padded(lists, TEMPERATURE), left_padded(lists, temperature=TEMPERATURE)):
        found = flat_statistics(batch, shared_statistics(model, batch, shared_prefix_buckets))[0]
        assert_close(found, one_by_one(model, lists)[0], EXACT, "pad ids were taken for padding")
