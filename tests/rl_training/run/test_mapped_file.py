"""Files of tensors that unpack to more than they are: refused before that takes memory or time."""

import zipfile
from pathlib import Path

import pytest
import torch

from rl_training.errors import UserError
from rl_training.run.optimizer_state import read_tensor_file


def _packed(path: Path, entries: dict[str, bytes]) -> None:
    """The file again, compressed and with more entries."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    folder = next(iter(content)).split("/")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in (content | {f"{folder}/{n}": data for n, data in entries.items()}).items():
            file.writestr(name, data)


def test_a_compressed_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save({"a": torch.ones(3)}, path)
    assert read_tensor_file(path)["a"].tolist() == [1, 1, 1]
    _packed(path, {"data/9": bytes(1 << 24)})
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=r"optimizer\.pt is compressed or claims to hold more.*copy it again"):
        read_tensor_file(path)


@pytest.mark.parametrize("inside", [lambda t: {"state": {0: {"exp_avg": t}}}, lambda t: [(t,)]])
def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path: Path, inside) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save(inside(torch.zeros(1).expand(10**6, 10**6)), path)
    with pytest.raises(UserError, match="has a tensor of 1,000,000,000,000 numbers and holds fewer"):
        read_tensor_file(path)
    torch.save(inside(torch.arange(6.0).reshape(2, 3).T), path)  # a view that repeats nothing
    read_tensor_file(path)
