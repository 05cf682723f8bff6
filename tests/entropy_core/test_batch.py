"""SequenceBatch: layouts that mean the same, layouts that mean nothing, and the cut into buckets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from entropy_core.batch import SequenceBatch, length_buckets, pass_order
from tests.entropy_core.support import left_padded, padded, right_padded
from tests.oracle.model_cases import TokenLists, random_sequences

LISTS = random_sequences(37)


def rebuilt(batch: SequenceBatch) -> TokenLists:
    """Token lists read back from the masks."""
    prompts, completions = [], []
    for ids, attended, completion in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        prompts.append(ids[attended & ~completion].tolist())
        completions.append(ids[completion].tolist())
    return TokenLists(prompts, completions, batch.prompt_index.tolist())


@pytest.mark.parametrize(
    "batch",
    [right_padded(LISTS), left_padded(LISTS), padded(LISTS, [0, 1, 2, 3, 2, 1, 0], [4] * 7, 9)],
    ids=["right", "left", "both"],
)
def test_tokens_survive_every_layout(batch: SequenceBatch) -> None:
    assert rebuilt(batch) == LISTS
    assert batch.completion_lengths.tolist() == [len(c) for c in LISTS.completion_ids]
    assert len(batch) == 7


def test_select_keeps_the_asked_order() -> None:
    order = [5, 0, 5, 2]
    chosen = rebuilt(right_padded(LISTS, 0.5).select(order))
    assert chosen.completion_ids == [LISTS.completion_ids[n] for n in order], "rows were sorted or deduplicated"
    assert chosen.prompt_index == [LISTS.prompt_index[n] for n in order], "prompt ids did not travel with their rows"
    assert right_padded(LISTS, 0.5).select(torch.tensor(order)).temperature == 0.5, "the temperature was lost"


def test_to_keeps_everything() -> None:
    moved = right_padded(LISTS, 0.5).to("cpu")
    assert rebuilt(moved) == LISTS and moved.temperature == 0.5


def test_integer_masks_are_accepted() -> None:
    batch = right_padded(LISTS)
    same = replace(batch, attention_mask=batch.attention_mask.long(), completion_mask=batch.completion_mask.long())
    assert rebuilt(same) == LISTS and same.completion_mask.dtype == torch.bool


def spoiled(name: str) -> dict[str, object]:
    """Arguments of a two-sequence batch (prompt of 2, completions of 2 and 3, one pad) with one thing
    wrong."""
    good = right_padded(TokenLists([[1, 2], [1, 2]], [[3, 4], [3, 4, 5]], [0, 0]))
    arguments = {
        "input_ids": good.input_ids,
        "attention_mask": good.attention_mask.clone(),
        "completion_mask": good.completion_mask.clone(),
        "prompt_index": good.prompt_index,
        "temperature": 1.0,
    }
    if name == "empty completion":
        arguments["completion_mask"][0] = False
    elif name == "completion not attended":
        arguments["attention_mask"][0, 3] = False
    elif name == "hole in the attention":
        arguments["attention_mask"][1, 1] = False
    elif name == "nothing before the completion":
        arguments["completion_mask"][1, :2] = True
    elif name == "shapes differ":
        arguments["completion_mask"] = arguments["completion_mask"][:, :-1]
    elif name == "prompt index too short":
        arguments["prompt_index"] = arguments["prompt_index"][:1]
    elif name == "no sequence":
        arguments = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    elif name == "greedy":
        arguments["temperature"] = 0.0
    elif name == "no temperature at all":
        arguments["temperature"] = float("inf")
    elif name == "ids that are no whole numbers":
        arguments["input_ids"] = arguments["input_ids"].float()
    elif name == "prompts that are no whole numbers":
        arguments["prompt_index"] = torch.tensor([0.0, 0.5])
    elif name == "a label's gap among the tokens":
        arguments["input_ids"] = arguments["input_ids"].clone().index_fill_(1, torch.tensor([1]), -100)
    return arguments


@pytest.mark.parametrize(
    "name",
    [
        "empty completion",
        "completion not attended",
        "hole in the attention",
        "nothing before the completion",
        "shapes differ",
        "prompt index too short",
        "no sequence",
        "greedy",
        "no temperature at all",
        "ids that are no whole numbers",
        "prompts that are no whole numbers",
        "a label's gap among the tokens",
    ],
)
def test_impossible_batches_are_refused(name: str) -> None:
    SequenceBatch(**spoiled("nothing"))
    with pytest.raises(ValueError):
        SequenceBatch(**spoiled(name))


def test_from_sequences_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError):
        SequenceBatch.from_sequences([[1], [2]], [[3]], [0, 1], 0)
    with pytest.raises(ValueError):
        SequenceBatch.from_sequences([[]], [[3]], [0], 0)


@pytest.mark.parametrize(
    "given",
    [([[1.5]], [[3]], [0]), ([["a"]], [[3]], [0]), ([[1]], [[True]], [0.5]), ([[1]], [[3]], ["gsm8k/1"])],
    ids=str,
)
def test_from_sequences_refuses_what_is_no_whole_number(given) -> None:
    """1.5 was taken for 1, and a name for an error of torch."""
    with pytest.raises(ValueError, match="must be whole numbers"):
        SequenceBatch.from_sequences(*given, 0)


def test_padding_may_hold_what_is_no_token() -> None:
    good = right_padded(TokenLists([[1, 2], [1, 2]], [[3, 4], [3, 4, 5]], [0, 0]))
    ids = good.input_ids.masked_fill(~good.attention_mask, -100)
    assert SequenceBatch(ids, good.attention_mask, good.completion_mask, good.prompt_index).input_ids.min() == -100


@pytest.mark.parametrize("token_batch_size", [1, 12, 25, 10_000])
@pytest.mark.parametrize("layout", [right_padded, left_padded], ids=["right", "left"])
def test_buckets_hold_every_completion_token_once(layout, token_batch_size: int) -> None:
    batch = layout(LISTS)
    seen = torch.zeros_like(batch.input_ids)
    rows = []
    for bucket in length_buckets(batch, token_batch_size):
        assert bucket.input_ids.numel() <= token_batch_size or len(bucket.indices) == 1, "a bucket is over its budget"
        at = (bucket.indices[bucket.rows], bucket.columns)
        seen[at] += 1
        assert torch.equal(batch.input_ids[at], bucket.targets), "a target is not the token that it claims to be"
        ids = torch.nn.functional.pad(bucket.input_ids, (0, 1), value=-1)
        following = ids[bucket.rows, bucket.positions + 1]  # -1: the longest sequences' last token, which is left out
        assert torch.equal(following[following >= 0], bucket.targets[following >= 0]), "positions are off by one"
        assert bool((following >= 0).any()) or int(batch.completion_lengths[bucket.indices].max()) == 1
        assert bucket.input_ids.shape[1] - int(bucket.positions.max()) == 1 + (len(ids) == ids.shape[1] - 2)
        rows += bucket.indices.tolist()
    assert sorted(rows) == list(range(7)), "a sequence is missing or stands in two buckets"
    assert torch.equal(seen, batch.completion_mask.long()), "a completion token is missing or counted twice"


def test_no_bucket_is_square() -> None:
    """Sequences first and time first would have one shape, and a module that mixes them up could not be told."""
    batch = SequenceBatch.from_sequences([[7, 8]] * 5, [[1] * 4] * 5, list(range(5)), 0)
    assert length_buckets(batch)[0].input_ids.shape == (5, 6), "the last token stays where leaving it out makes 5 x 5"
    assert length_buckets(batch.select([0, 1]))[0].input_ids.shape == (2, 5)


def test_a_bucket_needs_room() -> None:
    with pytest.raises(ValueError):
        length_buckets(right_padded(LISTS), 0)


def test_completions_stay_with_their_long_prompt_and_apart_from_a_short_one() -> None:
    completions = [[1] * k for k in (1, 5, 2, 4, 3, 6)]
    index = [0, 0, 0, 1, 1, 1]
    long, short = (SequenceBatch.from_sequences([[7] * k] * 6, completions, index, 0) for k in (9, 2))
    assert pass_order(long).tolist() == [0, 2, 1, 4, 3, 5]
    assert pass_order(short).tolist() == [0, 2, 4, 3, 1, 5]
    alone = SequenceBatch.from_sequences([[7] * 9] * 6, completions, list(range(6)), 0)
    assert pass_order(alone).tolist() == pass_order(short).tolist()


def test_buckets_are_cut_further_where_that_saves_padding() -> None:
    completions = [[1] * k for k in range(10, 110)]
    batch = SequenceBatch.from_sequences([[7, 8]] * 100, completions, list(range(100)), 0)
    few, many = length_buckets(batch, 10**6), length_buckets(batch, 10**6, fewest=False)
    assert len(few) == 1 and all(bucket.input_ids.numel() <= 1024 for bucket in many)
    assert sorted(index for bucket in many for index in bucket.indices.tolist()) == list(range(100))


def test_prompts_pass_by_their_longest_completion_in_buckets_as_full_as_they_may_be() -> None:
    completions = [[1] * k for k in (7, 9, 1, 3, 1, 8)]
    batch = SequenceBatch.from_sequences([[7] * 10] * 6, completions, [0, 0, 1, 1, 2, 2], 0)
    assert pass_order(batch).tolist() == [2, 3, 4, 5, 0, 1]
    assert [bucket.indices.tolist() for bucket in length_buckets(batch, 36)] == [[2, 3], [4, 5], [0], [1]]
    # a long row that filled its bucket does not count in the next one: 2 * 12 tokens fit, 2 * 19 would not
    after_long = SequenceBatch.from_sequences([[7] * 10] * 5, [[1] * k for k in (9, 9, 1, 2, 10)], [0, 0, 1, 1, 1], 0)
    assert [bucket.indices.tolist() for bucket in length_buckets(after_long, 36)] == [[0], [1], [2, 3], [4]]


def test_few_buckets_are_alike() -> None:
    def tokens(batch: SequenceBatch, most: int) -> list[int]:
        lengths = batch.attention_mask.sum(1)
        return [len(b.indices) * int(lengths[b.indices].max()) for b in length_buckets(batch, most)]

    same = SequenceBatch.from_sequences([[7, 8]] * 50, [[1] * 8] * 50, list(range(50)), 0)
    assert tokens(same, 400) == [250, 250], "400 and 100 need more memory in no less time"
    mixed = right_padded(random_sequences(37))
    for most in range(8, 80):  # the longest sequence has 8 tokens
        found = tokens(mixed, most)
        assert max(found) <= most and len(found) == len(tokens(mixed, max(found)))
        assert max(found) == 8 or len(tokens(mixed, max(found) - 1)) > len(found), "the largest could be smaller"


def test_completions_of_a_long_prompt_are_not_torn_apart() -> None:
    index = [n // 8 for n in range(64)]
    batch = SequenceBatch.from_sequences([[7] * 30] * 64, [[1] * (1 + n % 5) for n in range(64)], index, 0)
    buckets = length_buckets(batch, 4096, fewest=False)
    held = [{index[n] for n in bucket.indices.tolist()} for bucket in buckets]
    assert len(buckets) > 1 and sum(map(len, held)) == len(set().union(*held)) == 8
    assert len(length_buckets(batch, 4096)) == 1 and len(length_buckets(batch, 200, fewest=False)) > 8
