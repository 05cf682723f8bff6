"""Every line of code in docs/guides/gradient-store.md works exactly as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_core.batch import SequenceBatch
from entropy_core.gradients import per_sequence_gradients, trainable_parameters
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_experiments.kernel.store.fingerprint import store_fingerprint
from entropy_experiments.kernel.store.preconditioner_file import write_preconditioner
from tests.entropy_core.support import right_padded
from tests.entropy_experiments.store_cases import fill, new_store
from tests.oracle.model_cases import CASES, random_sequences

PAGE = Path(__file__).resolve().parents[3] / "docs" / "guides" / "gradient-store.md"
CASE = next(case for case in CASES if case.name == "llama_untied_lora")


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def results_folder(folder: Path, base_dtype: str) -> tuple[torch.nn.Module, SequenceBatch, dict[str, torch.Tensor]]:
    """A policy, its batch and its P; their gradients and P as an analysis leaves them in `folder`."""
    model, batch = CASE.make(torch.float32), right_padded(random_sequences(CASE.vocabulary, seed=1))
    rows = per_sequence_gradients(model, batch)
    fill(
        new_store(
            folder / "gradients",
            shapes={name: values.shape[1:] for name, values in rows.items()},
            num_grads=len(batch),
            base_dtype=base_dtype,
            fingerprint=store_fingerprint(model, batch, "score"),
        ),
        rows,
    )
    p = {name: 0.1 + torch.rand(parameter.shape) for name, parameter in trainable_parameters(model).items()}
    write_preconditioner(folder, p, {"formula": "1/(sqrt(v̂)+ε)"})
    return model, batch, p


def test_the_page_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model, batch, p = results_folder(tmp_path, "float32")
    monkeypatch.chdir(tmp_path)
    seen: dict = {}
    for block in blocks():
        if not block.startswith("# bfloat16"):
            exec(block, seen)
    assert len([line for line in blocks()[0].splitlines() if line.strip()]) == 3, "numpy reads it in three lines"
    rows = per_sequence_gradients(model, batch)
    first = next(iter(rows))
    np.testing.assert_array_equal(seen["as_matrices"], rows[first].numpy())
    np.testing.assert_allclose(seen["norms"], rows[first].flatten(1).norm(dim=1), rtol=1e-5)
    np.testing.assert_array_equal(seen["matrix"], torch.cat([v.flatten(1) for v in rows.values()], 1).numpy())
    assert torch.equal(seen["one"], rows[first]) and torch.equal(seen["some"][first], rows[first][:8])
    assert "gradients stored as float32: exact" in capsys.readouterr().out
    for found, preconditioner in (("as_analysed", p), ("with_damping", seen["damped"]), ("plain", None)):
        expected = compute_cross_fisher_kernel(model, batch, batch, preconditioner)
        assert float((seen[found] - expected).norm() / expected.norm()) < 3e-6
    assert not torch.allclose(seen["with_damping"], seen["as_analysed"])
    shapes = {name: values.shape[1:] for name, values in rows.items()}
    written = seen["store_rows"](
        tmp_path / "mine", model, batch, lambda at: {n: v[at] for n, v in rows.items()}, shapes, shard_rows=3
    )
    assert written.is_complete() and torch.equal(written.module(first), rows[first])


def test_the_bfloat16_line_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = results_folder(tmp_path, "bfloat16")
    monkeypatch.chdir(tmp_path)
    seen: dict = {}
    chosen = [block for block in blocks() if block.startswith(("import json", "name =", "# bfloat16"))]
    assert len(chosen) == 3
    for block in chosen:
        exec(block, seen)
    rows = per_sequence_gradients(model, batch)
    expected = rows[seen["name"]].flatten(1).bfloat16().float()
    assert seen["floats"].dtype == np.float32
    np.testing.assert_array_equal(seen["floats"], expected.numpy())
    assert "astype('uint32') << 16).view('float32')" in seen["info"]["stored_dtype_note"]


def test_sizes_on_the_page() -> None:
    """LoRA of rank r on a layer of `a` inputs and `b` outputs trains r (a + b) values."""

    def adapter(r: int, layers: int, hidden: int, kv: int, inner: int) -> int:
        return layers * r * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))

    smol, qwen = adapter(16, 30, 576, 192, 1536), adapter(64, 28, 1536, 256, 8960)
    for count, text in (
        (smol, "| 4.9 million | 20 MB | 195 GB | 98 GB |"),
        (qwen, "| 74 million | 295 MB | 3.0 TB | 1.5 TB |"),
    ):
        assert text in PAGE.read_text(encoding="utf-8")
        million, megabytes, much = (float(n) for n in re.findall(r"[\d.]+", text)[:3])
        assert count / 1e6 == pytest.approx(million, rel=0.01)
        assert 4 * count / 1e6 == pytest.approx(megabytes, rel=0.03)
        unit = 1e12 if "TB" in text else 1e9
        assert 10_000 * 4 * count / unit == pytest.approx(much, rel=0.02)


def test_messages_on_the_page_are_those_of_the_program() -> None:
    page = PAGE.read_text(encoding="utf-8")
    root = PAGE.parents[2]
    source = "".join(
        path.read_text(encoding="utf-8")
        for package in ("entropy_experiments", "rl_training")
        for path in (root / package).rglob("*.py")
    )
    for words in (
        "is damaged",
        "it was cut short",
        "shards are not finished",
        "holds other gradients",
        "has other values",
        "this program reads version",
        "no space left on this disk",
    ):
        assert words in page and words in source, words
