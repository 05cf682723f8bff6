"""Tensors written one by one: what safetensors reads back, and the same bytes for the same content."""

import json

import torch
from safetensors import safe_open

from entropy_experiments.checkpoints.readers.trained_state import LazyTensor
from entropy_experiments.checkpoints.safetensors_stream import write_tensors


def test_content_comes_back_and_metadata_keep_their_order(tmp_path):
    values = {"b": torch.randn(3, 4), "a": torch.arange(5), "empty": torch.zeros(0, 2, dtype=torch.bfloat16)}
    lazy = {name: LazyTensor(tuple(v.shape), v.dtype, name, lambda v=v: v) for name, v in values.items()}
    about = {f"key {number}": str(number) for number in range(20)}
    write_tensors(tmp_path / "file.safetensors", lazy, about)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata() == about and set(file.keys()) == set(values)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in values.items())
    data = (tmp_path / "file.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == list(about), "safetensors itself writes them in another order each time"
