"""Stores that are damaged, unfinished, or someone else's: one line each, and never a wrong number."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from entropy_experiments.kernel.store.store import GradientStore
from tests.entropy_experiments.store_cases import (
    IDENTITY,
    ROWS,
    SHAPES,
    SHARD_ROWS,
    content,
    fill,
    new_store,
    part_of,
    random_rows,
    refused,
)


def test_flipped_bits_are_always_found(tmp_path: Path) -> None:
    store = fill(new_store(tmp_path / "side"), random_rows())
    generator, good = random.Random(0), store.data_path.read_bytes()
    for _ in range(60):
        bit = generator.randrange(8 * len(good))
        row = bit // 8 // store.layout.row_bytes
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        store.data_path.write_bytes(bad)
        shard = row // SHARD_ROWS
        span = store.layout.shard_range(shard)
        message = rf"shard {shard} \(rows {span.start} to {span.stop - 1}\) is damaged"
        readers = [
            lambda opened, shard=shard: opened.shard(shard),
            lambda opened: opened.rows(slice(None)),
            lambda opened, row=row: opened.rows(slice(row, row + 1)),
            lambda opened: opened.module("scale"),
            lambda opened: opened.check(),
        ]
        for read in readers:
            with refused(message):
                read(GradientStore.open(store.folder, IDENTITY))
        GradientStore.open(store.folder, verify=False).rows(slice(None))  # asked not to look
    store.data_path.write_bytes(good)
    opened = GradientStore.open(store.folder)
    opened.check()


def test_a_damaged_shard_can_be_written_again(tmp_path: Path) -> None:
    rows = random_rows()
    store = fill(new_store(tmp_path / "side"), rows)
    good = content(store.folder)
    with store.data_path.open("r+b") as handle:
        handle.seek(store.layout.row_bytes * 6)
        handle.write(b"\xff")
    with refused("shard 1 .* delete .*00001.json and resume"):
        store.check()
    (store.folder / "shards" / "00001.json").unlink()
    resumed = new_store(store.folder)
    assert resumed.unfinished_shards() == [1]
    assert not (store.folder / "gradients.bin").exists(), "numpy must not take it for whole meanwhile"
    fill(resumed, rows)
    assert content(store.folder) == good


def test_swapped_shards_and_foreign_records_are_found(tmp_path: Path) -> None:
    store = fill(new_store(tmp_path / "side"), random_rows())
    shards = store.folder / "shards"
    (shards / "00002.json").write_bytes((shards / "00001.json").read_bytes())
    with refused("00002.json is the record of another store's shard: delete it and resume"):
        GradientStore.open(store.folder).shard(2)
    (shards / "00002.json").write_text('{"crc32": "00000000"}')
    with refused("00002.json is no record of a shard"):
        GradientStore.open(store.folder).shard(2)
    (shards / "00002.json").write_text("{")
    with refused("00002.json is not valid JSON"):
        GradientStore.open(store.folder).storage_error()


def test_a_file_that_was_cut_short_is_found(tmp_path: Path) -> None:
    store = fill(new_store(tmp_path / "side"), random_rows())
    size = store.layout.total_bytes
    os.truncate(store.data_path, size - 1)
    with refused(rf"gradients.bin has {size - 1} of {size} bytes: it was cut short"):
        GradientStore.open(store.folder)
    with refused(f"ends at byte {size - 1}, before its rows do"):  # cut after it was opened: no crash
        store.shard(5)
    os.truncate(store.data_path, size + 1)
    with refused("it was changed"):
        GradientStore.open(store.folder)
    store.data_path.unlink()
    with refused("No such file"):
        GradientStore.open(store.folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    store = fill(new_store(tmp_path / "side"), random_rows(), [0, 1, 5])
    assert store.finished_shards() == [0, 1, 5] and store.unfinished_shards() == [2, 3, 4]
    assert not (store.folder / "gradients.bin").exists(), "numpy must not take an unfinished store for whole"
    opened = GradientStore.open(store.folder, IDENTITY)
    assert torch.equal(opened.shard(5)["scale"], random_rows()["scale"][20:])
    with refused(r"shard 2 \(rows 8 to 11\) is not finished"):
        opened.rows(slice(7, 9))
    with refused(r"3 of 6 shards are not finished \(the first is shard 2 \(rows 8 to 11\)\)"):
        opened.check()
    with pytest.raises(ValueError, match="there is no shard 6: the store has 6"):
        opened.shard(6)


# ---- identity


CHANGES = [
    (dict(shapes={**SHAPES, "layer.0.bias": (5,)}), r"the parameter 'layer.0.bias' is \[5\] now, \[6\] in the store"),
    (dict(shapes={**SHAPES, "new": (5,)}), "the parameter 'new' is not in the store"),
    (dict(shapes={"scale": ()}), "the store's parameter 'embed.weight' is not there now"),
    (dict(shapes=dict(reversed(SHAPES.items()))), "its parameters stand in another order"),
    (dict(num_grads=24), "num_grads is 24 now, 23 in the store"),
    (dict(kind="entropy"), "kind is entropy now, score in the store"),
    (dict(base_dtype="float16"), "base_dtype is float16 now, float32 in the store"),
    (dict(shard_rows=5), "shard_rows is 5 now, 4 in the store"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_store_of_another_layout_is_not_resumed(change: dict, message: str, tmp_path: Path) -> None:
    fill(new_store(tmp_path), random_rows(), [0])
    before = content(tmp_path)
    with refused(message):
        new_store(tmp_path, **change)
    assert content(tmp_path) == before


def test_a_store_of_another_model_or_batch_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    fill(new_store(tmp_path), random_rows())
    other = replace(IDENTITY, parameters={**IDENTITY.parameters, "scale": "float32[]:cc"})
    for call in (lambda: GradientStore.open(tmp_path, other), lambda: new_store(tmp_path, fingerprint=other)):
        with refused("the trainable parameter 'scale' has other values now than in the store"):
            call()
    with refused("the batch's temperature: 0.7 now, 1.0 in the store"):
        GradientStore.open(tmp_path, replace(IDENTITY, batch={**IDENTITY.batch, "temperature": "0.7"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format_version=2), "has format version 2, this program reads version 1"),
        (dict(format_version=None), "has no format_version: it was not written by this program"),
        (dict(num_grads="many"), "is damaged"),
        (dict(shapes=None), "is damaged"),
        (dict(fingerprint={}), "is damaged"),
        (dict(grad_sizes={"scale": 1}), "contradicts itself"),
        (dict(base_dtype="float16"), "contradicts itself"),
        (dict(num_grads=22), "it was changed"),
    ],
)
def test_info_that_cannot_be_right_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    fill(new_store(tmp_path), random_rows())
    info = json.loads((tmp_path / "info.json").read_text())
    (tmp_path / "info.json").write_text(json.dumps(info | change))
    with refused(message):
        GradientStore.open(tmp_path)


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    with refused("no gradient store at .*: there is no info.json"):
        GradientStore.open(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with refused("is not empty .there is notes.txt., and is no gradient store"):
        new_store(tmp_path)
    with refused("notes.txt"):
        new_store(tmp_path / "notes.txt" / "below")
    (tmp_path / "info.json").write_text("[]")
    with refused("info.json must hold a JSON object"):
        GradientStore.open(tmp_path)
    new_store(tmp_path / "side")
    with refused("holds a gradient store already"):
        GradientStore.create(tmp_path / "side", SHAPES, ROWS, "score", "float32", 4, IDENTITY)


def test_mistakes_of_the_caller(tmp_path: Path) -> None:
    for change in (dict(num_grads=0), dict(shard_rows=0), dict(shapes={}), dict(shapes={"a": (0, 2)})):
        with pytest.raises(ValueError, match="at least"):
            new_store(tmp_path / "side", **change)
    for change in (dict(base_dtype="int8"), dict(kind="loss")):
        with pytest.raises(ValueError, match="unknown"):
            new_store(tmp_path / "side", **change)
    store, rows = new_store(tmp_path / "side"), random_rows()
    with pytest.raises(ValueError, match=r"rows of 'embed.weight' are \(23, 7, 3\), this shard needs \(4, 7, 3\)"):
        store.write_shard(0, rows)
    with pytest.raises(ValueError, match="'scale' is in one of them alone"):
        store.write_shard(0, {name: values for name, values in rows.items() if name != "scale"})
    with refused("has no finished shard yet"):
        store.storage_error()
    fill(store, rows)
    with pytest.raises(ValueError, match="shard 0 of .* is finished already"):
        store.write_shard(0, part_of(rows, range(4)))
    with pytest.raises(ValueError, match="has no parameter 'x'"):
        store.module("x")
    for nothing in (slice(5, 5), slice(9, 3), slice(40, 50)):
        with pytest.raises(ValueError, match="holds none of the 23 rows"):
            store.rows(nothing)
    with pytest.raises(ValueError, match="consecutively"):
        store.rows(slice(0, 9, 2))
