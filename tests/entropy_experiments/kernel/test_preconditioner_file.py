"""P in a file of its own: read as written, refused when damaged."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entropy_experiments.kernel.store.preconditioner_file import (
    PRECONDITIONER_NAME,
    read_preconditioner,
    write_preconditioner,
)
from rl_training.errors import UserError
from tests.entropy_experiments.store_cases import SHAPES, refused

METADATA = {"formula": "1/(sqrt(v̂)+ε)", "epsilon": "1e-08", "step": "500"}


def preconditioner() -> dict[str, torch.Tensor]:
    p = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    return p | {"transposed": torch.rand(3, 4).T, "half": torch.rand(5).bfloat16()}


def test_round_trip(tmp_path: Path) -> None:
    p = preconditioner()
    path = write_preconditioner(tmp_path / "new", p, METADATA)
    assert path == tmp_path / "new" / "preconditioner.safetensors" and list(path.parent.iterdir()) == [path]
    found, metadata = read_preconditioner(tmp_path / "new")
    assert metadata == METADATA and found.keys() == p.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in p.items())


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    p = preconditioner()
    write_preconditioner(tmp_path, p, METADATA)
    with refused("is there already"):
        write_preconditioner(tmp_path, p, {})
    write_preconditioner(tmp_path, p, {}, overwrite=True)
    assert read_preconditioner(tmp_path)[1] == {}


def test_flipped_bits_are_always_found(tmp_path: Path) -> None:
    path = write_preconditioner(tmp_path, preconditioner(), METADATA)
    good, generator = path.read_bytes(), random.Random(0)
    for _ in range(60):
        bit = generator.randrange(8 * 8, 8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            p, metadata = read_preconditioner(tmp_path)
        except UserError:
            continue
        raise AssertionError(f"bit {bit} of {8 * len(good)} was missed: {metadata}, {list(p)}")


def test_files_that_are_no_preconditioner(tmp_path: Path) -> None:
    with refused("no preconditioner at"):
        read_preconditioner(tmp_path)
    (tmp_path / PRECONDITIONER_NAME).write_bytes(b"")
    with refused("is not a readable safetensors file"):
        read_preconditioner(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / PRECONDITIONER_NAME)
    with refused("no checksum in its metadata"):
        read_preconditioner(tmp_path)


def test_a_full_disk_leaves_nothing_behind_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(path: Path, content: bytes) -> None:
        with path.open("wb") as handle:
            handle.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(UserError, match="no space left"):
        write_preconditioner(tmp_path, preconditioner(), METADATA)
    assert not list(tmp_path.iterdir())
