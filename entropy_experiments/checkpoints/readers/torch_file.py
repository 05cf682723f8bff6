"""A file that `torch.save` wrote, or a piece of a file that holds one, read without torch.load:
nothing of it is executed.

It is a zip archive, uncompressed: `data.pkl` describes the objects, and the values of each storage
lie in `data/<key>`. Only the description is read at once.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

from entropy_experiments.checkpoints.readers.allowed_names import CHECKPOINT_NAMES, STORAGES
from entropy_experiments.checkpoints.readers.inert_pickle import MOST_BYTES, Damaged, Name, read_pickle
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
from rl_training.errors import UserError
from rl_training.run.sidecar import refuse_special_file

_LOCAL_HEADER = 30
_MOST_ENTRIES = 1_000_000
# What zipfile raises for a damaged directory: names that are no text and offsets out of range among it.
_ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, ValueError, OverflowError, EOFError,
    IndexError, KeyError,
)  # fmt: skip


def read_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The objects of a file, its tensors as `StoredTensor`.

    Args:
        path: The file.
        start: Where in it the archive begins, in bytes.
        length: Bytes of the archive; by default to the file's end.

    Raises:
        UserError: For a file that is absent, damaged, cut short, or holds anything but tensors and
            plain data.
    """
    try:
        refuse_special_file(path)
        return _Archive(path, start, length).content()
    except (Damaged, OSError, *_ZIP_ERRORS) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UserError:
    """The refusal of a file, with what is wrong in it."""
    what = (
        str(error).splitlines()[0]
        if isinstance(error, Damaged | OSError) and str(error)
        else "it is no archive of torch.save"
    )
    return UserError(
        f"{path} cannot be read: {what}; copy the checkpoint again, or save it anew with the trainer that wrote it"
    )


class _Window(io.RawIOBase):
    """A piece of a file, as a file of its own."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = path.open("rb"), start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


class _Archive:
    """The entries of one archive: where the bytes of each lie in the file."""

    def __init__(self, path: Path, start: int, length: int | None) -> None:
        self._path = path
        size = path.stat().st_size
        self._length = size - start if length is None else length
        if start < 0 or self._length <= 0 or start + self._length > size:
            raise Damaged("it is shorter than its description says: it was cut short")
        self._start = start
        self._entries: dict[str, tuple[int, int]] = {}
        with _Window(path, start, self._length) as window, zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
            entries = archive.infolist()
            if len(entries) > _MOST_ENTRIES or sum(entry.file_size for entry in entries) > self._length:
                raise Damaged("it claims to hold more than fits into it")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise Damaged("it is compressed, which torch.save does not do")
                self._entries[entry.filename.partition("/")[2]] = (entry.header_offset, entry.file_size)

    def content(self) -> Any:
        if self._bytes("byteorder", 16).strip() not in (b"", b"little"):
            raise Damaged("it was written on a machine of another byte order")
        if "data.pkl" not in self._entries:
            raise Damaged("it is no archive of torch.save")
        return read_pickle(self._bytes("data.pkl", MOST_BYTES), CHECKPOINT_NAMES, self._storage)

    def _bytes(self, name: str, most: int) -> bytes:
        if name not in self._entries:
            return b""
        header, size = self._entries[name]
        if size > most:
            raise Damaged(f"its description is of {size} bytes, more than any checkpoint's")
        return bytes(self._part(self._data_of(header), 0, size))

    def _data_of(self, header: int) -> int:
        """Where an entry's bytes begin, by its local header."""
        start = self._part(header, 0, _LOCAL_HEADER)
        if len(start) != _LOCAL_HEADER or start[:4] != b"PK\x03\x04":
            raise Damaged("it is damaged")
        name, extra = struct.unpack("<HH", start[26:30])
        return header + _LOCAL_HEADER + name + extra

    def _part(self, origin: int, start: int, stop: int) -> bytearray:
        begin = origin + start
        if begin < 0 or begin + stop - start > self._length:
            raise Damaged("it is shorter than its description says: it was cut short")
        data = bytearray(stop - start)
        with self._path.open("rb") as file:
            file.seek(self._start + begin)
            data = data[: file.readinto(data)]
        return data

    def _storage(self, identity: tuple[Any, ...]) -> StoredTensor:
        """identity: ("storage", class, key, device, elements)."""
        if len(identity) < 5 or identity[0] != "storage" or not isinstance(identity[1], Name):
            raise Damaged("a tensor of it lies nowhere")
        dtype = STORAGES.get(identity[1].text.rpartition(" ")[2])
        entry = self._entries.get(f"data/{identity[2]}") if isinstance(identity[2], str) else None
        if dtype is None or entry is None or type(identity[4]) is not int:
            raise Damaged("a tensor of it has no values")
        header, size = entry
        if identity[4] * dtype.itemsize != size:
            raise Damaged("a tensor of it has other values than its description says: the file is damaged")
        origin = self._data_of(header)
        if origin + size > self._length:
            raise Damaged("it is shorter than its description says: it was cut short")
        return StoredTensor(dtype, (identity[4],), (1,), 0, size, lambda start, stop: self._part(origin, start, stop))
