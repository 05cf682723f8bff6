"""Per-sequence gradients of one side on disk: written shard by shard, by any number of processes, and read back.

    store = GradientStore.resume(folder, shapes, num_grads, "score", "float32", shard_rows, fingerprint)   # one process
    for number in store.unfinished_shards(): store.write_shard(number, rows)                               # any process
    store = GradientStore.open(folder, fingerprint); store.shard(0)                                        # anywhere

A shard is finished when its record is in shards/, and the record is written (under another name, flushed, renamed) only
after its data were flushed: whatever kills a process, a shard is whole or it does not count. When the last is finished,
gradients.bin.part gets its name. The layout: entropy_experiments.kernel.store.layout, docs/guides/gradient-store.md.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from entropy_experiments.kernel.store.data import checksum, opened, read_checksum, read_rows, stored_pieces, write_at
from entropy_experiments.kernel.store.fingerprint import Fingerprint
from entropy_experiments.kernel.store.layout import (
    DATA_NAME,
    INFO_NAME,
    SHARDS_NAME,
    RowKind,
    StoredDtype,
    StoreLayout,
)
from entropy_experiments.kernel.store.records import ShardRecord, StorageError
from rl_training.errors import UserError
from rl_training.files import PART, read_json_object, remove_leftovers, rename_whole, write_json_whole
from rl_training.run.disk import disk_errors_explained

_T = TypeVar("_T")
Shapes = Mapping[str, tuple[int, ...]]
_RECORD = re.compile(r"(\d{5,})\.json")
_REMEDY = "compute the gradients again"


class GradientStore:
    """One side's rows in a folder. Make one by `create`, `resume` or `open`; it holds no open file and can be pickled.

    Attributes: `folder`; `layout` (names, shapes, sizes, kind, precision, fingerprint); `verify`, whether a shard's checksum
    is verified when it is first read by this object.
    """

    def __init__(self, folder: Path, layout: StoreLayout, verify: bool = True) -> None:
        self.folder, self.layout, self.verify = folder, layout, verify
        self._verified: set[int] = set()

    @classmethod
    def create(
        cls,
        folder: Path | str,
        shapes: Shapes,
        num_grads: int,
        kind: RowKind,
        base_dtype: StoredDtype,
        shard_rows: int,
        fingerprint: Fingerprint,
    ) -> GradientStore:
        """Lay out an empty store; one process does this, others `open` it afterwards.

        shapes: parameter -> shape, in the order of a row. shard_rows: sequences in a shard. Raises UserError where the
        folder holds a store or other things already, or where the disk has no room for it all.
        """
        folder = Path(folder)
        layout = _layout(shapes, num_grads, kind, base_dtype, shard_rows, fingerprint)
        if _has_info(folder):
            raise UserError(f"{folder} holds a gradient store already: resume it, or remove it first")
        with disk_errors_explained(folder, "making room for the gradients"):
            # A creation that was killed leaves these at most, and a file that got no name yet.
            ours = {DATA_NAME + ".part", SHARDS_NAME}
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
            odd = [name for name in names if name not in ours and not (name.startswith(".") and name.endswith(PART))]
            if odd or any((folder / SHARDS_NAME).glob("*")):
                raise UserError(
                    f"{folder} is not empty (there is {(odd or [SHARDS_NAME])[0]}), and is no gradient store"
                )
            (folder / SHARDS_NAME).mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            _check_room(folder, layout)
            part = folder / (DATA_NAME + ".part")
            part.unlink(missing_ok=True)  # of a creation that was killed, or a link to somebody's file
            with part.open("xb") as handle:
                handle.truncate(layout.total_bytes)
                os.fsync(handle.fileno())
            write_json_whole(folder / INFO_NAME, layout.to_info())
        return cls(folder, layout)

    @classmethod
    def resume(
        cls,
        folder: Path | str,
        shapes: Shapes,
        num_grads: int,
        kind: RowKind,
        base_dtype: StoredDtype,
        shard_rows: int,
        fingerprint: Fingerprint,
    ) -> GradientStore:
        """The store of just these arguments: the one in the folder, finished shards and all, or a new one.

        Raises UserError where the folder holds a store of another model, batch, objective or layout, naming the first
        difference; and as `create`.
        """
        folder = Path(folder)
        if not _has_info(folder):
            return cls.create(folder, shapes, num_grads, kind, base_dtype, shard_rows, fingerprint)
        store = cls.open(folder)
        wanted = _layout(shapes, num_grads, kind, base_dtype, shard_rows, fingerprint)
        _refuse_difference(folder, wanted.difference(store.layout))
        with disk_errors_explained(folder, "resuming"):
            store._take_back_name()
            store._name_when_whole()
        return store

    @classmethod
    def open(cls, folder: Path | str, fingerprint: Fingerprint | None = None, verify: bool = True) -> GradientStore:
        """A store that exists, finished or not.

        fingerprint: of the model and batch at hand, where the rows must be theirs. Raises UserError for a folder that is no
        store, cannot be read, has another format version, contradicts itself or was cut short, and for a store of another
        model, batch or objective, naming the first difference.
        """
        folder = Path(folder)
        if not _has_info(folder):
            raise UserError(f"no gradient store at {folder}: there is no {INFO_NAME}")
        info = read_json_object(folder / INFO_NAME, _REMEDY)
        store = cls(folder, StoreLayout.from_info(info, str(folder / INFO_NAME)), verify)
        if fingerprint is not None:
            _refuse_difference(folder, fingerprint.difference(store.layout.fingerprint, "now", "in the store"))
        with disk_errors_explained(folder, "looking at the gradients"):
            size, expected = store.data_path.stat().st_size, store.layout.total_bytes
        if size != expected:
            how = "cut short" if size < expected else "changed"
            raise UserError(f"{store.data_path} has {size} of {expected} bytes: it was {how}; {_REMEDY}")
        return store

    @property
    def data_path(self) -> Path:
        """gradients.bin, or gradients.bin.part until every shard is finished."""
        whole = self.folder / DATA_NAME
        part = self.folder / (DATA_NAME + ".part")
        # The last shard's writer renames: look again before believing that neither is there.
        return part if not whole.exists() and part.exists() else whole

    # ---- writing

    def finished_shards(self) -> list[int]:
        """Numbers of the shards that were written whole, ascending."""
        with disk_errors_explained(self.folder, "listing the shards"):
            found = (_RECORD.fullmatch(entry.name) for entry in os.scandir(self.folder / SHARDS_NAME))
            return sorted(int(match[1]) for match in found if match)

    def unfinished_shards(self) -> list[int]:
        """Numbers of the shards that are still to be written, ascending."""
        finished = set(self.finished_shards())
        return [number for number in range(self.layout.shard_count) if number not in finished]

    def is_complete(self) -> bool:
        """Whether every shard is finished."""
        return not self.unfinished_shards()

    def write_shard(self, number: int, rows: Mapping[str, Tensor]) -> None:
        """Write shard `number`: rows, name -> (n, *shape), of the sequences `layout.shard_range(number)`, on any device.

        Different shards may be written by different processes at once; each by one. Raises UserError for values that are not
        finite or do not fit (naming sequence and parameter) and for a full or forbidden disk: the shard then is not finished,
        and can be written again. Raises ValueError for rows of other names or shapes, and for a finished shard.
        """
        layout, span = self.layout, self.layout.shard_range(number)
        _check_rows(layout, rows, len(span))
        record_path = self._record_path(number)
        if record_path.exists():
            raise ValueError(f"shard {number} of {self.folder} is finished already")
        crc, offset, pieces = 0, span.start * layout.row_bytes, []
        with (
            disk_errors_explained(self.folder, f"writing shard {number}"),
            opened(self.data_path, os.O_WRONLY) as descriptor,
        ):
            for piece in stored_pieces(layout, rows, span.start):
                crc = checksum(piece.values, crc)
                offset += write_at(descriptor, piece.values, offset)
                pieces.append(piece._replace(values=piece.values[:0]))
            os.fsync(descriptor)
            record = ShardRecord.of(number, span, len(span) * layout.row_bytes, crc, pieces)
            write_json_whole(record_path, record.to_json())
            self._name_when_whole()

    def storage_error(self) -> StorageError:
        """What storing did to the rows of all finished shards. Raises UserError while there is none."""
        records = [self._record(number) for number in self.finished_shards()]
        if not records:
            raise UserError(f"{self.folder} has no finished shard yet")
        return StorageError.over(records, self.layout.base_dtype, self.layout.row_values)

    # ---- reading

    def shard(self, number: int) -> dict[str, Tensor]:
        """The rows of one shard, name -> (n, *shape) float32 on the CPU. Raises as `rows`."""
        span = self.layout.shard_range(number)
        return self.rows(slice(span.start, span.stop))

    def rows(self, rows: slice) -> dict[str, Tensor]:
        """Consecutive rows, name -> (n, *shape) float32 on the CPU; views into one buffer of whole rows.

        Raises UserError where a shard is not finished, its bytes are not those that were written (naming shard and rows), or
        the file was cut short or cannot be read.
        """
        values = self.block(rows)
        return {name: self._shaped(name, values[:, columns]) for name, columns in self.layout.columns().items()}

    def module(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Consecutive rows of one parameter, (n, *shape) float32 on the CPU. Raises as `rows`."""
        if name not in self.layout.shapes:
            raise ValueError(f"{self.folder} has no parameter {name!r}")
        return self._shaped(name, self.block(rows, self.layout.columns()[name]))

    def block(self, rows: slice = slice(None), columns: slice | None = None, out: Tensor | None = None) -> Tensor:
        """(n, c) float32 on the CPU: consecutive rows, and consecutive columns of the flat row (None: all).

        out: a contiguous float32 tensor of this shape to read into. Raises as `rows`.
        """
        start, stop, step = rows.indices(self.layout.num_grads)
        if step != 1:
            raise ValueError("rows are read consecutively: a step other than 1 is not possible")
        span = range(start, max(start, stop))
        if not span:
            raise ValueError(f"{rows} holds none of the {self.layout.num_grads} rows")
        alone = None
        with disk_errors_explained(self.folder, "reading"):
            for number in range(span[0] // self.layout.shard_rows, span[-1] // self.layout.shard_rows + 1):
                if not self._record_path(number).exists():
                    raise UserError(
                        f"{self.folder}: {self._named(number)} is not finished: resume the run that writes it"
                    )
                if (span, columns) == (self.layout.shard_range(number), None) and self._unseen(number):
                    alone = number  # checked below, on the very bytes that are handed out
                else:
                    self.check_shard(number)
            values, crc = self._read(
                lambda path: read_rows(path, self.layout, span, columns, out, with_checksum=alone is not None)
            )
        if alone is not None:
            self._compare(alone, crc)
        return values

    def check_shard(self, number: int) -> None:
        """Hold a shard's bytes against its checksum, once; nothing where `verify` is off. Raises UserError where they differ."""
        if self._unseen(number):
            self._compare(number, self._checksum(number))

    def check(self) -> None:
        """Read every shard and hold it against its checksum. Raises UserError for the first that is missing or differs."""
        self.check_complete()
        with disk_errors_explained(self.folder, "reading"):
            for number in range(self.layout.shard_count):
                self._compare(number, self._checksum(number))

    def check_complete(self) -> None:
        """Raises UserError where shards are not finished, naming the first."""
        missing = self.unfinished_shards()
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.layout.shard_count} shards are not finished (the first is "
                f"{self._named(missing[0])}): resume the run that writes them"
            )

    # ---- inside

    def _shaped(self, name: str, values: Tensor) -> Tensor:
        """(n, *shape) of one parameter's (n, values) columns, a view."""
        shape = self.layout.shapes[name]
        return values.unflatten(1, shape or (1,)).reshape(-1, *shape)

    def _read(self, read: Callable[[Path], _T]) -> _T:
        try:
            return read(self.data_path)
        except FileNotFoundError:  # the last shard's writer renamed it between looking and opening
            return read(self.data_path)

    def _unseen(self, number: int) -> bool:
        return self.verify and number not in self._verified

    def _checksum(self, number: int) -> int:
        return self._read(lambda path: read_checksum(path, self.layout, self.layout.shard_range(number)))

    def _compare(self, number: int, found: int) -> None:
        expected = self._record(number).crc32
        if f"{found:08x}" != expected:
            raise UserError(
                f"{self.data_path}: {self._named(number)} is damaged (checksum {found:08x}, written as {expected}): delete "
                f"{self._record_path(number)} and resume to compute it again"
            )
        self._verified.add(number)

    def _named(self, number: int) -> str:
        span = self.layout.shard_range(number)
        return f"shard {number} (rows {span.start} to {span.stop - 1})"

    def _record_path(self, number: int) -> Path:
        return self.folder / SHARDS_NAME / f"{number:05d}.json"

    def _record(self, number: int) -> ShardRecord:
        path, span = self._record_path(number), self.layout.shard_range(number)
        remedy = "delete it and resume to compute this shard again"
        content = read_json_object(path, remedy)
        try:
            record = ShardRecord.from_json(content)
        except ValueError as error:
            raise UserError(f"{path} is no record of a shard ({error}): {remedy}") from error
        size = len(span) * self.layout.row_bytes
        if (record.shard, record.start, record.end, record.bytes) != (number, span.start, span.stop, size):
            raise UserError(f"{path} is the record of another store's shard: {remedy}")
        return record

    def _name_when_whole(self) -> None:
        part, whole = self.folder / (DATA_NAME + ".part"), self.folder / DATA_NAME
        if not self.is_complete():
            return
        remove_leftovers(self.folder)  # every record has its name, so nobody writes here any more
        if part.exists():
            try:
                rename_whole(part, whole)
            except FileNotFoundError:
                if not whole.exists():  # else another process finished its shard at the same moment
                    raise

    def _take_back_name(self) -> None:
        """Where the record of a damaged shard was deleted; for one process before any writes."""
        whole = self.folder / DATA_NAME
        if whole.exists() and not self.is_complete():
            rename_whole(whole, self.folder / (DATA_NAME + ".part"))


def _has_info(folder: Path) -> bool:
    with disk_errors_explained(folder, "looking for a gradient store"):
        return (folder / INFO_NAME).exists()


def _layout(
    shapes: Shapes, num_grads: int, kind: RowKind, base_dtype: StoredDtype, shard_rows: int, fingerprint: Fingerprint
) -> StoreLayout:
    plain = {name: tuple(shape) for name, shape in shapes.items()}
    return StoreLayout(plain, num_grads, kind, base_dtype, shard_rows, fingerprint)


def _refuse_difference(folder: Path, found: str | None) -> None:
    if found:
        raise UserError(
            f"{folder} holds other gradients, {found}: choose another folder, or remove it to compute them again"
        )


def _check_room(folder: Path, layout: StoreLayout) -> None:
    free = shutil.disk_usage(folder).free
    if layout.total_bytes > free:
        advice = "" if layout.base_dtype != "float32" else ", store as bfloat16 (half the size)"
        raise UserError(
            f"{folder}: {layout.num_grads} gradients of {layout.row_values} values as {layout.base_dtype} need "
            f"{layout.total_bytes / 2**30:.3g} GiB, this disk has {free / 2**30:.3g} GiB: free some{advice}, or choose another"
        )


def _check_rows(layout: StoreLayout, rows: Mapping[str, Tensor], count: int) -> None:
    if rows.keys() != layout.shapes.keys():
        odd = next(iter(rows.keys() ^ layout.shapes.keys()))
        raise ValueError(f"the rows' parameters are not the store's: {odd!r} is in one of them alone")
    for name, shape in layout.shapes.items():
        if tuple(rows[name].shape) != (count, *shape):
            raise ValueError(f"rows of {name!r} are {tuple(rows[name].shape)}, this shard needs {(count, *shape)}")
