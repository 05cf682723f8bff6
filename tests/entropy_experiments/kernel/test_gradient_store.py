"""The gradient store: what is written is what is read, and nothing else is ever taken for it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_experiments.kernel.store import data as gradient_store_data
from entropy_experiments.kernel.store.layout import StoreLayout
from entropy_experiments.kernel.store.store import GradientStore
from tests.entropy_experiments.store_cases import (
    IDENTITY,
    ROWS,
    SHAPES,
    SHARD_ROWS,
    fill,
    new_store,
    random_rows,
    refused,
)

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one value in normal range."""


# ---- what is written is what is read


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip(data: st.DataObject) -> None:
    shapes = data.draw(
        st.dictionaries(
            st.text("abc.é_0", min_size=1, max_size=8),
            st.lists(st.integers(1, 5), max_size=3).map(tuple),
            min_size=1,
            max_size=4,
        )
    )
    count, shard_rows = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 20))
    base_dtype = data.draw(st.sampled_from(sorted(ROUNDING)))
    rows = random_rows(count, data.draw(st.integers(0, 99)), shapes)
    # The exact answer is numpy's or, for bfloat16, arithmetic on bits; torch does the storing.
    exact = {name: _rounded(values.numpy(), base_dtype) for name, values in rows.items()}
    order = data.draw(st.permutations(range(-(-count // shard_rows))))
    given_dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "side"
        store = new_store(path, shapes=shapes, num_grads=count, base_dtype=base_dtype, shard_rows=shard_rows)
        fill(store, {name: values.to(given_dtype) for name, values in rows.items()}, list(order))
        assert store.is_complete() and (path / "gradients.bin").exists()
        assert (path / "gradients.bin").stat().st_size == store.layout.total_bytes
        again = GradientStore.open(path, IDENTITY)
        again.check()
        start = data.draw(st.integers(0, count - 1))
        stop = data.draw(st.integers(start + 1, count))
        found, shard = again.rows(slice(start, stop)), data.draw(st.sampled_from(order))
        span = again.layout.shard_range(shard)
        whole = again.shard(shard)
        for name, values in exact.items():
            assert found[name].dtype == torch.float32 and found[name].shape == (stop - start, *shapes[name])
            np.testing.assert_array_equal(found[name].numpy(), values[start:stop])
            np.testing.assert_array_equal(whole[name].numpy(), values[span.start : span.stop])
            np.testing.assert_array_equal(again.module(name, slice(start, stop)).numpy(), values[start:stop])
            np.testing.assert_array_equal(again.module(name).numpy(), values)


def _rounded(values: np.ndarray, base_dtype: str) -> np.ndarray:
    if base_dtype != "bfloat16":
        return values.astype(base_dtype).astype("float32")
    bits = values.view("uint32").astype("uint64")
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return (nearest_even << 16).astype("uint32").view("float32")


def test_rows_given_in_less_than_float32_are_stored_as_they_are(tmp_path: Path) -> None:
    rows = {name: values.bfloat16() for name, values in random_rows().items()}
    store = fill(new_store(tmp_path / "side"), rows)
    assert torch.equal(store.module("embed.weight"), rows["embed.weight"].float())
    assert store.storage_error().relative == 0.0


def test_any_way_of_cutting_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, pieces of shards and parts of rows are but ways through one file."""
    rows = random_rows()
    expected = np.concatenate([rows[name].reshape(ROWS, -1).numpy() for name in SHAPES], axis=1).tobytes()
    for shard_rows in (1, 4, 23, 50):
        for piece in (1, 700, 2**20):
            monkeypatch.setattr(gradient_store_data, "PIECE_BYTES", piece)
            store = fill(new_store(tmp_path / f"{shard_rows}-{piece}", shard_rows=shard_rows), rows)
            assert store.data_path.read_bytes() == expected
            store.check()
            block = store.block(slice(3, 20), slice(5, 31)).numpy()
            np.testing.assert_array_equal(block, np.frombuffer(expected, "float32").reshape(ROWS, -1)[3:20, 5:31])


def test_numpy_reads_it_by_the_keys_that_bergson_writes(tmp_path: Path) -> None:
    rows = random_rows()
    folder = fill(new_store(tmp_path / "side"), rows).folder
    info = json.loads((folder / "info.json").read_text())
    structured = np.memmap(folder / "gradients.bin", dtype=info["dtype"], mode="r", shape=(info["num_grads"],))
    flat = np.memmap(
        folder / "gradients.bin",
        dtype=info["base_dtype"],
        mode="r",
        shape=(info["num_grads"], sum(info["grad_sizes"].values())),
    )
    assert list(structured.dtype.names) == list(info["grad_sizes"]) == list(SHAPES)
    for name, values in rows.items():
        np.testing.assert_array_equal(structured[name], values.reshape(ROWS, -1).numpy())
        np.testing.assert_array_equal(structured[name].reshape(-1, *info["shapes"][name]), values.numpy())
    np.testing.assert_array_equal(flat, np.concatenate([v.reshape(ROWS, -1) for v in rows.values()], axis=1))


# ---- precision


@pytest.mark.parametrize("base_dtype", ROUNDING)
def test_rounding_error_is_measured(base_dtype: str, tmp_path: Path) -> None:
    rows = random_rows()
    rows["scale"][5], rows["embed.weight"][:, 0] = 1e-9, 3e-8  # float16 knows nothing between 0 and 6e-8
    store = fill(new_store(tmp_path / "side", base_dtype=base_dtype), rows)
    flat = torch.cat([rows[name].reshape(ROWS, -1) for name in SHAPES], dim=1).double().numpy()
    error = np.concatenate([store.module(name).reshape(ROWS, -1) for name in SHAPES], axis=1) - flat
    found, worst = store.storage_error(), np.linalg.norm(error, axis=1) / np.linalg.norm(flat, axis=1)
    assert found.relative == pytest.approx(np.linalg.norm(error) / np.linalg.norm(flat), rel=1e-5)
    assert found.worst == pytest.approx(worst.max(), rel=1e-5)
    zeros = int(((flat + error == 0) & (flat != 0)).sum())
    assert found.rounded_to_zero == pytest.approx(zeros / flat.size) and (zeros > 0) == (base_dtype == "float16")
    if base_dtype == "float32":
        assert str(found) == "gradients stored as float32: exact"
    else:
        assert found.worst_row == worst.argmax()
        assert 0 < found.relative < ROUNDING[base_dtype]
        assert base_dtype in str(found) and f"{found.relative:.1e}" in str(found)


def test_a_row_too_small_for_float16_is_known_as_lost(tmp_path: Path) -> None:
    """Squares of 1e-30 leave float32: the error of such a row is 1, not 0 / 0."""
    rows = {name: values.clone() for name, values in random_rows().items()}
    for values in rows.values():
        values[9] = 1e-30
    found = fill(new_store(tmp_path / "side", base_dtype="float16"), rows).storage_error()
    assert (found.worst_row, found.worst) == (9, pytest.approx(1.0))


def test_rows_of_zeros_have_no_error(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(values) for name, values in random_rows().items()}
    found = fill(new_store(tmp_path / "side", base_dtype="float16"), zeros).storage_error()
    assert (found.relative, found.worst, found.rounded_to_zero) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("base_dtype", "value", "message"),
    [
        ("float32", float("nan"), r"sequence 9: its gradient of 'layer.0.bias' has NaN"),
        ("float16", float("inf"), r"sequence 9: its gradient of 'layer.0.bias' has infinite values"),
        ("float16", -65536.0, r"sequence 9: its gradient of 'layer.0.bias' reaches 6.55e\+04, too large for float16"),
        ("bfloat16", 3.4e38, r"sequence 9: .* too large for bfloat16"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(base_dtype: str, value: float, message: str, tmp_path: Path) -> None:
    rows = random_rows()
    rows["layer.0.bias"][9, 3] = value
    store = new_store(tmp_path / "side", base_dtype=base_dtype)
    with refused(message):
        fill(store, rows)
    assert store.finished_shards() == [0, 1] and not store.is_complete(), "the third shard holds sequence 9"
    fill(store, random_rows())
    GradientStore.open(store.folder).check()


def test_large_values_that_fit_are_kept(tmp_path: Path) -> None:
    rows = {name: torch.full_like(values, 65504.0) for name, values in random_rows().items()}
    assert fill(new_store(tmp_path / "half", base_dtype="float16"), rows).storage_error().relative == 0.0
    rows = {name: torch.full_like(values, -3e38) for name, values in rows.items()}  # their squares leave float32
    assert fill(new_store(tmp_path / "single"), rows).module("scale")[0] == torch.tensor(-3e38)


def test_layout_knows_its_sizes() -> None:
    layout = StoreLayout(SHAPES, ROWS, "score", "float16", SHARD_ROWS, IDENTITY)
    assert (layout.row_values, layout.row_bytes, layout.total_bytes, layout.shard_count) == (48, 96, 96 * 23, 6)
    assert [len(layout.shard_range(number)) for number in range(6)] == [4, 4, 4, 4, 4, 3]
    assert re.fullmatch(r"\(21,\)[<>]f2", layout.to_info()["dtype"]["formats"][0])
