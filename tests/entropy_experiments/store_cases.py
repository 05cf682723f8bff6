"""Gradient stores for tests, and what other processes do with them: writing, dying in the middle, being a poor user."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from entropy_experiments.kernel.store.fingerprint import Fingerprint
from entropy_experiments.kernel.store.store import GradientStore
from rl_training.errors import UserError
from tests.warm_python import WarmProcess

SHAPES = {"embed.weight": (7, 3), "layer.0.weight": (4, 5), "scale": (), "layer.0.bias": (6,)}
ROWS, SHARD_ROWS = 23, 4
IDENTITY = Fingerprint(
    parameters={"embed.weight": "float32[7, 3]:aa", "scale": "float32[]:bb"},
    frozen={},
    settings={},
    batch={"sequences": "23", "temperature": "1.0"},
    objective={"kind": "score"},
)
NOBODY = 65534


def random_rows(count: int = ROWS, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Rows over six decades, as gradients are."""
    generator = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(
            (generator.standard_normal((count, *shape)) * 10 ** generator.uniform(-4, 2, (count, *shape))).astype(
                "float32"
            )
        )
        for name, shape in shapes.items()
    }


def refused(pattern: str):
    """The one line that a user would see."""
    return pytest.raises(UserError, match=pattern)


def part_of(rows: dict[str, Tensor], span: range) -> dict[str, Tensor]:
    return {name: values[span.start : span.stop] for name, values in rows.items()}


def new_store(folder: Path, **changes: Any) -> GradientStore:
    """An empty store of `random_rows()`."""
    arguments = dict(
        shapes=SHAPES, num_grads=ROWS, kind="score", base_dtype="float32", shard_rows=SHARD_ROWS, fingerprint=IDENTITY
    )
    return GradientStore.resume(folder, **(arguments | changes))


def fill(store: GradientStore, rows: dict[str, Tensor], numbers: list[int] | None = None) -> GradientStore:
    for number in store.unfinished_shards() if numbers is None else numbers:
        store.write_shard(number, part_of(rows, store.layout.shard_range(number)))
    return store


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a store, byte by byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- other processes


def in_process(function: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a fresh process that runs `function`, of a module's top level."""
    return in_processes(function, [arguments])[0]


def in_processes(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int]:
    """The same, several at once."""
    module, name = function.__module__, function.__qualname__
    call = f"import pickle, {module}; {module}.{name}(*pickle.loads(bytes.fromhex('{{}}')))"
    processes = [WarmProcess("-c", call.format(pickle.dumps(each).hex())) for each in arguments]
    for process in processes:
        sys.stderr.write(process.communicate(500)[1])
    return [process.wait() for process in processes]


def write_every(folder: Path, rank: int, size: int, base_dtype: str) -> None:
    """Write shards rank, rank + size, ... of an existing store."""
    torch.set_num_threads(1)
    store = GradientStore.open(folder, IDENTITY)
    assert store.layout.base_dtype == base_dtype
    fill(store, random_rows(), list(range(rank, store.layout.shard_count, size)))


def die_while_writing(folder: Path, deadly: int, told: Path) -> None:
    """Make or resume a store and write it; die by SIGKILL at the `deadly`-th thing done to the disk, a write half done.

    Where the writer lives to the end, the number of things it did is written to `told`.
    """
    done = 0

    def counted(call: Callable[..., Any], halve: bool) -> Callable[..., Any]:
        def replaced(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done == deadly:
                if halve:
                    descriptor, data, offset = arguments
                    call(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments)
            done += 1
            if done == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return replaced

    os.pwrite, os.fsync, os.replace = counted(os.pwrite, True), counted(os.fsync, False), counted(os.replace, False)
    torch.set_num_threads(1)
    fill(new_store(folder), random_rows())
    told.write_text(str(done))


def expect_message(expected: str, call: Callable[[], Any]) -> None:
    """Exit with an assertion unless `call` raises a UserError whose message contains `expected`."""
    try:
        call()
    except UserError as error:
        assert expected in str(error), f"{expected!r} is not in {error}"
        assert "\n" not in str(error)
    else:
        raise AssertionError(f"no error; expected {expected!r}")


def become_nobody() -> None:
    """Root may read and write everything; another user may not."""
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def meet_closed_folders(closed: Path, unwritable: Path) -> None:
    rows = random_rows()
    become_nobody()
    expect_message("not permitted", lambda: GradientStore.open(closed))
    expect_message("not permitted", lambda: new_store(unwritable / "new"))
    expect_message("not permitted", lambda: fill(GradientStore.open(unwritable), rows))


def meet_file_size_limit(folder: Path, limit: int, shard: int) -> None:
    """Under a limit on file sizes the write itself must fail, and leave the shard unfinished."""
    import resource

    store = GradientStore.open(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    expect_message("larger than this file system", lambda: fill(store, random_rows(), [shard]))
    assert shard in store.unfinished_shards()
