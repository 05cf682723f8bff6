"""Coefficients that depend on statistics of the whole batch: which sequences pass twice for them, and that graphs stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import entropy_core.batch
from entropy_core import graph_passes as passes
from entropy_core import scores
from entropy_core.batch import Bucket, SequenceBatch, length_buckets
from entropy_core.entropy import TokenCoefficients, entropy_coefficients
from entropy_core.gradients import batch_gradients, gradient_rows, keeping, stream_rows
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import TokenStatistics, token_statistics
from tests.entropy_core.support import right_padded
from tests.oracle.model_cases import CASES, random_sequences

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("token_batch_size", [8192, 16, 1])
@pytest.mark.parametrize("name", ["llama_tied", "llama_tied_lora"])
def test_statistics_take_a_pass_only_where_graphs_do_not_show_them(
    name: str, token_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buckets whose graphs fit side by side pass once, all others twice; numbers are those of known statistics."""
    monkeypatch.setattr(entropy_core.batch, "ENOUGH_TOKENS", 8)  # buckets of a few tokens
    case = BY_NAME[name]
    batch, model = right_padded(random_sequences(case.vocabulary)), case.make()
    buckets = sorted(length_buckets(batch, token_batch_size, fewest=False), key=lambda b: -b.input_ids.numel())
    statistics = token_statistics(model, batch, all_digits=True)
    known = entropy_coefficients(statistics, batch, "rao_blackwell")
    expected_rows, expected = gradient_rows(model, batch, known), batch_gradients(model, batch, [known])[0]
    passed: list[tuple[int, bool]] = []
    ordinary = passes.completion_values

    def counted(model: Any, bucket: Bucket, *args: Any, **kwargs: Any) -> Any:
        passed.append((len(bucket.indices), torch.is_grad_enabled()))
        return ordinary(model, bucket, *args, **kwargs)

    for module in (passes, scores):
        monkeypatch.setattr(module, "completion_values", counted)

    def coefficients(found: TokenStatistics) -> list[TokenCoefficients]:
        torch.testing.assert_close(found.logprobs, statistics.logprobs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.entropies, statistics.entropies, rtol=1e-12, atol=1e-12)
        return [entropy_coefficients(found, batch, "rao_blackwell")]

    def once_or_twice(run: Any) -> None:
        passed.clear()
        run()
        tokens = [bucket.input_ids.numel() for bucket in buckets]
        held = max(k for k in range(1, len(tokens) + 1) if k == 1 or sum(tokens[:k]) <= token_batch_size)
        assert (held > 1) == (token_batch_size > 1) and (held < len(tokens)) == (token_batch_size < 8192)
        assert [n for n, graph in passed if graph] == [len(bucket.indices) for bucket in buckets]
        again = sum(n for n, graph in passed if not graph)
        assert again == sum(len(bucket.indices) for bucket in buckets[held:]), "a graph showed the statistics already"

    rows: dict[str, Tensor] = {n: torch.zeros_like(row) for n, row in expected_rows.items()}
    once_or_twice(
        lambda: stream_rows(model, batch, coefficients, keeping([rows]), passes=PassSettings(token_batch_size))
    )
    gradients: list[dict[str, Tensor]] = []
    once_or_twice(
        lambda: gradients.extend(batch_gradients(model, batch, coefficients, passes=PassSettings(token_batch_size)))
    )
    for parameter, row in expected_rows.items():
        torch.testing.assert_close(
            rows[parameter], row, rtol=1e-9, atol=1e-11, msg=f"inputs of {parameter} are mixed up"
        )
        torch.testing.assert_close(gradients[0][parameter], expected[parameter], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("shared", "buckets"), [(9, 1), (2, 3), (0, 2)])
def test_beginnings_that_many_sequences_share_pass_in_one_bucket(
    shared: int, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine of twelve tokens alike: one bucket, whose distinct tokens are fewer than half. Two of twelve: small buckets.

    So too where nothing is shared (0) and half of one bucket would be padding: all but one sequence are four tokens long.
    """
    monkeypatch.setattr(entropy_core.batch, "ENOUGH_TOKENS", 24)
    case = BY_NAME["llama_tied_lora"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(case.vocabulary, (6, 12), generator=generator)
    attended, mask = torch.ones_like(ids), (torch.arange(12) >= 9).expand(6, 12)
    if shared > 0:
        ids[:, :shared] = ids[0, :shared]
    else:
        ids[:, 8] = torch.arange(6)
        attended[1:, :8] = 0  # padding on the left
    batch = SequenceBatch(ids, attended, mask, torch.arange(6))
    model, passed = case.make(), []
    known = entropy_coefficients(token_statistics(model, batch, all_digits=True), batch, "rao_blackwell")
    expected = gradient_rows(model, batch, known)
    rows = {name: torch.zeros_like(row) for name, row in expected.items()}

    def coefficients(found: TokenStatistics) -> list[TokenCoefficients]:
        return [entropy_coefficients(found, batch, "rao_blackwell")]

    ordinary = passes.completion_values
    monkeypatch.setattr(
        passes, "completion_values", lambda *a, **k: passed.append(len(a[1].indices)) or ordinary(*a, **k)
    )
    stream_rows(model, batch, coefficients, keeping([rows]))
    assert len(passed) == buckets and sum(passed) == 6
    for name, row in expected.items():
        torch.testing.assert_close(rows[name], row, rtol=1e-9, atol=1e-11, msg=name)
