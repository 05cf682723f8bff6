"""Several kinds of rows from one forward pass: the bytes of each kind are those it has when it is formed alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.gradients import gradient_rows
from entropy_core.passes import frozen_head as output_head
from entropy_core.passes.row_formation import RowFormation
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import Processes
from entropy_core.scores import token_statistics
from entropy_experiments.kernel.store import row_storage
from entropy_experiments.kernel.store.row_storage import StoredRows, store_rows
from entropy_experiments.kernel.store.store import GradientStore
from tests.entropy_experiments.analyses.tiny_step import sample_batch
from tests.entropy_experiments.store_cases import content
from tests.oracle.model_cases import CASES
from tests.two_processes import in_two_processes

MODELS = [case for case in CASES if case.name in ("llama_untied_lora", "qwen2_biases")]  # head frozen, and trained


def world(case):
    model = case.make(torch.float32)
    batch = sample_batch(model, 11, 2, torch.Generator().manual_seed(3))
    terms = entropy_coefficients(token_statistics(model, batch), batch, "rao_blackwell")
    return model, batch, {"score": score_coefficients(batch), "entropy": terms}


def kinds(folder: Path, coefficients) -> list[StoredRows]:
    return [StoredRows(folder / kind, kind, c) for kind, c in coefficients.items()]


def both(folder: Path, case=MODELS[0], processes: Processes | None = None) -> list[GradientStore]:
    model, batch, coefficients = world(case)
    wanted = kinds(folder, coefficients)
    return store_rows(
        model, batch, wanted, storage="float32", shard_rows=4, passes=PassSettings(64), processes=processes
    )


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_bytes_are_those_of_each_kind_alone(case, tmp_path: Path) -> None:
    model, batch, coefficients = world(case)
    for store in both(tmp_path / "together", case):
        kind = store.layout.kind
        wanted = kinds(tmp_path / "alone", {kind: coefficients[kind]})
        alone = store_rows(model, batch, wanted, storage="float32", shard_rows=4, passes=PassSettings(64))[0]
        assert content(store.folder) == content(alone.folder), kind
        some = range(4, 8)  # the second shard, formed by the function that forms rows of one kind
        c = coefficients[kind]
        chosen = type(c)(c.entropy[list(some)], c.logprob[list(some)])
        rows = gradient_rows(model, batch.select(list(some)), chosen, passes=PassSettings(64))
        for name, part in store.shard(1).items():
            assert torch.equal(part, rows[name]), f"{kind} rows of {name}"


def test_the_model_is_passed_once_for_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, coefficients = world(MODELS[0])
    seen: list[int] = []
    one_pass = output_head._one_pass
    monkeypatch.setattr(
        output_head, "_one_pass", lambda m, b, *rest: (seen.append(len(b.indices)), one_pass(m, b, *rest))[1]
    )
    unchecked = RowFormation("hooks", verify=False)
    arguments = {"storage": "float32", "shard_rows": 4, "passes": PassSettings(64, unchecked)}
    store_rows(model, batch, kinds(tmp_path, coefficients), **arguments)
    assert sum(seen) == len(batch)
    seen.clear()
    store_rows(model, batch, kinds(tmp_path, coefficients), **arguments)
    assert seen == [], "whole stores are left as they are"


def _shared() -> None:
    group = Processes.world()
    both(Path(os.environ["ROW_STORAGE_FOLDER"]), processes=group)


def test_two_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = both(tmp_path / "alone")
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ROW_STORAGE_FOLDER", str(tmp_path / "together"))
    in_two_processes(_shared)
    for store in alone:
        assert content(tmp_path / "together" / store.folder.name) == content(store.folder)


def test_killed_between_the_kinds_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind's shard is there and the other's is not: only that one is written, with the same bytes."""
    expected = [content(store.folder) for store in both(tmp_path / "quiet")]
    model, batch, coefficients = world(MODELS[0])
    write, written = GradientStore.write_shard, []

    def killed(self: GradientStore, number: int, rows) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append((self.layout.kind, number))
        write(self, number, rows)

    monkeypatch.setattr(GradientStore, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        both(tmp_path / "killed")
    assert written == [("score", 0), ("entropy", 0), ("score", 1)]
    monkeypatch.setattr(
        GradientStore,
        "write_shard",
        lambda self, number, rows: (written.append((self.layout.kind, number)), write(self, number, rows))[1],
    )
    wanted = kinds(tmp_path / "killed", coefficients)
    stores = store_rows(model, batch, wanted, storage="float32", shard_rows=4, passes=PassSettings(64))
    assert written[3:5] == [("entropy", 1), ("score", 2)] and len(set(written)) == len(written) == 12
    assert [content(store.folder) for store in stores] == expected


def _slowly(folder: Path, pause: float) -> None:
    form = row_storage._rows
    row_storage._rows = lambda *arguments: (time.sleep(pause), form(*arguments))[1]
    both(folder)


def test_killed_at_random_moments_and_resumed(tmp_path: Path) -> None:
    threads, moments, killed = torch.get_num_threads(), random.Random(5), 0
    torch.set_num_threads(1)
    try:
        expected = [content(store.folder) for store in both(tmp_path / "quiet")]
        for kill in range(6):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    # The first one never comes to its end, however fast the machine is.
                    _slowly(tmp_path / "killed", 0.02 if kill else 3600.0)
                    code = 0
                finally:
                    os._exit(code)
            time.sleep(moments.uniform(0.02, 0.2))
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        resumed = both(tmp_path / "killed")
    finally:
        torch.set_num_threads(threads)
    assert killed > 0, "no process was killed while it worked"
    assert [content(store.folder) for store in resumed] == expected
