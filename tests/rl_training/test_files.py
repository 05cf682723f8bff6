"""The one writer of files: whole or absent, never through a link, and disk trouble in one line."""

from __future__ import annotations

import ast
import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import entropy_experiments
import rl_training
from rl_training import files
from rl_training.errors import ResumableError, UserError
from rl_training.files import (
    append_line,
    own_folder,
    read_json_object,
    read_regular,
    remove_leftovers,
    rename_whole,
    replace_folder,
    replacing,
    strange_files,
    write_all_whole,
    write_json_whole,
    write_whole,
    write_whole_by,
)
from rl_training.run.disk import disk_errors_explained
from rl_training.run.rollouts import write_rollouts


def points_away(folder: Path) -> Path:
    victim = folder / "elsewhere" / "victim"
    victim.parent.mkdir()
    victim.write_text("precious")
    return victim


WRITERS: dict[str, Callable[[Path, str], object]] = {
    "text": write_whole,
    "bytes": lambda path, text: write_whole(path, text.encode()),
    "by a path": lambda path, text: write_whole_by(path, lambda part: part.write_text(text)),
    "JSON": write_json_whole,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_else(
    writer: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(ResumableError, match=r"out: writing: no space left on this disk; free some and resume"):
        with disk_errors_explained(path, "writing"):
            WRITERS[writer](path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("writer", WRITERS)
def test_the_file_is_on_the_disk_before_it_has_its_name(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "out", []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda what: (order.append(what), flush(what)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("named"), replace(a, b)))
    WRITERS[writer](path, "new")
    content, named, names = order
    assert content.parent == tmp_path and content.name.endswith(files.PART) and named == "named" and names == tmp_path
    assert path.read_text().strip('"\n') == "new"


def test_a_folder_takes_its_name_and_the_name_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "flush", flushed.append)
    (tmp_path / "out.part").mkdir()
    rename_whole(tmp_path / "out.part", tmp_path / "out")
    assert flushed == [tmp_path] and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_no_json_are_not_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_whole(tmp_path / "out.json", {"a": [1.0, value]})
    assert list(tmp_path.iterdir()) == []


def test_floats_and_letters_come_back_as_they_were(tmp_path: Path) -> None:
    content = {"a": 0.1 + 0.2, "b": 5e-324, "c": "ΔH"}
    write_json_whole(tmp_path / "out.json", content)
    assert read_json_object(tmp_path / "out.json", "redo it") == content
    assert "ΔH" in (tmp_path / "out.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read .No such file"), ("{", "is not valid JSON"), ("[1]", "must hold a JSON object")],
)
def test_an_object_that_cannot_be_read_is_refused_with_the_remedy(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"{words}.*: redo it"):
        read_json_object(path, "redo it")


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EDQUOT, ResumableError, "no space left"),
        (errno.EFBIG, UserError, "larger than this file system"),
        (errno.EROFS, UserError, "not permitted .Read-only file system"),
        (errno.EIO, UserError, "Input/output error"),
    ],
)
def test_disk_trouble_is_one_line(number: int, kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words) as caught, disk_errors_explained(tmp_path, "writing shard 3"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{tmp_path}: writing shard 3: ") and "\n" not in str(caught.value)


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    left, others = (
        tmp_path / "a" / f".out.{'0' * 16}.part",
        [tmp_path / "a" / "gradients.bin.part", tmp_path / ".x.part"],
    )
    left.parent.mkdir()
    for path in (left, *others):
        path.write_text("half")
    remove_leftovers(tmp_path)
    assert not left.exists() and all(path.exists() for path in others)


def _renames_or_writes(path: Path) -> list[str]:
    """Calls by which a module would write a file by itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = node.func.value, node.func.attr
            by_os = isinstance(owner, ast.Name) and owner.id == "os" and name in ("replace", "rename", "link")
            by_path = name in ("write_text", "write_bytes", "symlink_to") or (name == "rename" and len(node.args) == 1)
            if by_os or by_path:
                found.append(f"{path}:{node.lineno} {name}")
    return found


def test_nobody_else_writes_or_renames_files() -> None:
    folders = [Path(str(package.__file__)).parent for package in (rl_training, entropy_experiments)]
    own = Path(str(files.__file__))
    assert len(_renames_or_writes(own)) == 6, "the test is blind"
    assert [
        line for folder in folders for path in folder.rglob("*.py") if path != own for line in _renames_or_writes(path)
    ] == []


def test_a_file_of_a_links_name_replaces_the_link(tmp_path):
    victim, path = points_away(tmp_path), tmp_path / "out.json"
    path.symlink_to(victim)
    write_whole(path, "new")
    assert path.read_text() == "new" and not path.is_symlink() and victim.read_text() == "precious"
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(UserError, match="is a link"):
        append_line(path, "new")
    (tmp_path / "rollouts").symlink_to(tmp_path)
    for action in (lambda: own_folder(tmp_path / "rollouts"), lambda: write_rollouts(tmp_path, 1, [])):
        with pytest.raises(UserError, match="is a link"):
            action()
    assert victim.read_text() == "precious"


def test_a_part_is_a_new_file_of_its_own_and_is_gone_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "out") as part:
        part.write_text("half")
        assert part.parent == tmp_path and part.stat().st_nlink == 1
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_lies_at_a_parts_name_is_not_opened(tmp_path, monkeypatch):
    """Names are random; were one guessed, a hard link there would be another file."""
    monkeypatch.setattr("rl_training.files.secrets.token_hex", lambda n: "0" * 2 * n)
    victim = points_away(tmp_path)
    os.link(victim, tmp_path / f".out.{'0' * 16}.part")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "out", "new")
    assert victim.read_text() == "precious" and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- several files, folders, and what is not ours
@pytest.mark.parametrize("place", range(3))
def test_several_files_are_written_all_or_none(tmp_path, monkeypatch, place):
    (tmp_path / "a").write_text("old")
    contents = {"a": "new", "figures/b.png": b"1", "figures/c.png": b"2"}
    rename, renamed, flushed = os.replace, [], []

    def full(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 1 + place:
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="full"):
            write_all_whole(tmp_path, contents)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]
    monkeypatch.setattr(os, "replace", lambda *names: (renamed.append(names), rename(*names)))
    write_all_whole(tmp_path, contents)
    assert {p.name for p in tmp_path.rglob("*")} == {"a", "figures", "b.png", "c.png"} and len(renamed) == 3


def test_a_folder_is_replaced_or_kept(tmp_path, monkeypatch):
    for name in ("old", "new.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "new.part", tmp_path / "old")
    assert [(p.name, (p / "file").read_text()) for p in tmp_path.iterdir()] == [("old", "new.part")]


def test_what_is_not_ours_is_named(tmp_path):
    for name in ("a", "figures/b.png", f".a.{'0' * 16}.part", "figures/mine.svg", "notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert strange_files(tmp_path, {"a", "figures"}) == ["figures/mine.svg", "notes"]


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="is no regular file"):
            read_regular(tmp_path / name)
    for path in (tmp_path / "loop", tmp_path / "absent"):
        with pytest.raises(UserError, match="cannot be read .*: mend it"):
            read_regular(path, remedy="mend it")
    with pytest.raises(UserError, match="is no regular file"):
        read_regular(Path("/dev/zero"))
    assert read_regular(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes, and no run writes more than 4"):
        read_regular(tmp_path / "file", limit=4)
