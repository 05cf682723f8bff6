"""Several writers, killed writers, full and closed disks: a shard is whole, or it does not count."""

from __future__ import annotations

import errno
import os
import pickle
import random
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from entropy_experiments.kernel.store.store import GradientStore
from tests.entropy_experiments.store_cases import (
    IDENTITY,
    content,
    die_while_writing,
    fill,
    in_process,
    in_processes,
    meet_closed_folders,
    meet_file_size_limit,
    new_store,
    random_rows,
    refused,
    write_every,
)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_several_processes_write_one_file(base_dtype: str, tmp_path: Path) -> None:
    alone = fill(new_store(tmp_path / "alone", base_dtype=base_dtype, shard_rows=1), random_rows())
    together = new_store(tmp_path / "together", base_dtype=base_dtype, shard_rows=1)
    codes = in_processes(write_every, [(together.folder, rank, 3, base_dtype) for rank in range(3)])
    assert codes == [0, 0, 0]
    assert content(together.folder) == content(alone.folder)
    GradientStore.open(together.folder, IDENTITY).check()


def test_data_are_on_the_disk_before_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SIGKILL cannot show and a power cut would: data flushed, record flushed, then named, then the name flushed."""
    store, events = new_store(tmp_path), []
    record = tmp_path / "shards" / "00001.json"

    def seen(name: str) -> None:
        real = getattr(os, name)

        def replaced(*arguments):
            first = arguments[0]
            what = Path(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first).name
            begun = any(record.parent.glob(".00001.json.*.part"))
            what = re.sub(r"[0-9a-f]{16}", "*", what)
            events.append((name, what, begun, record.exists()))
            return real(*arguments)

        monkeypatch.setattr(os, name, replaced)

    for name in ("pwrite", "fsync", "replace"):
        seen(name)
    fill(store, random_rows(), [1])
    assert events == [
        ("pwrite", "gradients.bin.part", False, False),
        ("fsync", "gradients.bin.part", False, False),
        ("fsync", ".00001.json.*.part", True, False),
        ("replace", ".00001.json.*.part", True, False),
        ("fsync", "shards", False, True),
    ]


@pytest.mark.long
def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert in_process(die_while_writing, undisturbed, -1, tmp_path / "count") == 0
    expected, moments = content(undisturbed), int((tmp_path / "count").read_text())
    assert moments > 50
    # Ten moments at random, and the four at either end: making room, naming the whole.
    deadly = {1, 2, 3, 4, *range(moments - 3, moments + 1), *random.Random(1).sample(range(1, moments + 1), 10)}
    unfinished = set()
    for moment in sorted(deadly):
        folder = tmp_path / f"killed-{moment}"
        assert in_process(die_while_writing, folder, moment, tmp_path / "unused") == -9
        if (folder / "info.json").exists():
            left = GradientStore.open(folder, IDENTITY)
            unfinished.add(len(left.unfinished_shards()))
            for number in left.finished_shards():
                left.shard(number)  # finished means whole
            assert left.is_complete() or not (folder / "gradients.bin").exists()
        fill(new_store(folder), random_rows())
        assert content(folder) == expected, f"killed at moment {moment} of {moments}"
    assert len(unfinished) > 4, "the kills did not land in different places"


def test_killed_three_times_and_resumed(tmp_path: Path) -> None:
    undisturbed = content(fill(new_store(tmp_path / "undisturbed"), random_rows()).folder)
    for moment in (25, 15, 12):
        assert in_process(die_while_writing, tmp_path / "killed", moment, tmp_path / "unused") == -9
    fill(new_store(tmp_path / "killed"), random_rows())
    assert content(tmp_path / "killed") == undisturbed


def test_a_store_can_be_sent_to_another_process(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(fill(new_store(tmp_path), random_rows())))
    assert torch.equal(store.module("embed.weight"), random_rows()["embed.weight"])


# ---- disks


def test_no_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with refused(r"1000000000000 gradients of 48 values as float32 need 1.79e\+05 GiB, this disk has .*bfloat16"):
        new_store(tmp_path / "side", num_grads=10**12)
    assert not (tmp_path / "side" / "info.json").exists()
    new_store(tmp_path / "side")  # what the refused one left is no obstacle


def test_a_full_disk_fails_in_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with refused("writing shard 2: no space left on this disk; free some and resume"):
        fill(store, random_rows(), [2])
    assert store.finished_shards() == []


def test_a_small_file_system_fills_up(tmp_path: Path) -> None:
    """A sparse file promises more than the disk holds; the write says so, in place of a SIGBUS."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        shapes = {"weight": (100, 100)}
        store = new_store(disk / "side", shapes=shapes, num_grads=20, shard_rows=2)
        (disk / "other").write_bytes(bytes(500_000))
        rows = random_rows(20, shapes=shapes)
        with refused("writing shard [567]: no space left on this disk"):
            fill(store, rows)
        finished = store.finished_shards()
        assert 5 <= len(finished) < 10
        opened = GradientStore.open(store.folder)
        for number in finished:
            opened.shard(number)
        (disk / "other").unlink()
        fill(store, rows)
        GradientStore.open(store.folder).check()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    store = fill(new_store(tmp_path / "side"), random_rows(), [0, 1])
    limit = store.layout.row_bytes * 9  # within the third shard
    assert in_process(meet_file_size_limit, store.folder, limit, 2) == 0
    fill(store, random_rows())
    GradientStore.open(store.folder).check()


def test_folders_that_may_not_be_read_or_written() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        closed, unwritable = new_store(root / "closed").folder, new_store(root / "unwritable").folder
        closed.chmod(0)
        for path in (unwritable / "gradients.bin.part", unwritable / "shards", unwritable):
            path.chmod(path.stat().st_mode & ~0o222)
        assert in_process(meet_closed_folders, closed, unwritable) == 0
        for path in (unwritable, unwritable / "shards", closed):
            path.chmod(0o755)
