"""What all tests of a session read is made once, handed out in copies, and whoever changes it is found."""

import os
from types import SimpleNamespace

import pytest

from tests.shared_artefacts import changed_artefacts, made_once, session_folder


@pytest.fixture
def factory(tmp_path):
    """A session of its own, seen by one of its workers."""
    (tmp_path / "popen-gw0").mkdir()
    return SimpleNamespace(getbasetemp=lambda: tmp_path / "popen-gw0")


def test_it_is_made_once_and_handed_out_in_copies(factory, tmp_path):
    calls = []

    def make(folder):
        (folder / "file").write_text("content")
        calls.append(folder)
        return {"path": folder / "file"}

    first, second = (made_once(factory, "thing", make) for _ in range(2))
    assert len(calls) == 1 and first == second and first is not second
    assert first["path"].read_text() == "content" and first["path"].is_relative_to(tmp_path / "shared")
    assert changed_artefacts(factory) == []


def test_workers_share_a_folder_and_sessions_do_not(factory, tmp_path):
    assert session_folder(factory) == tmp_path
    alone = SimpleNamespace(getbasetemp=lambda: tmp_path / "pytest-7")
    assert session_folder(alone) == tmp_path / "pytest-7"


@pytest.mark.parametrize("change", ["add", "remove", "rewrite"])
def test_who_changes_it_is_found(factory, change):
    path = made_once(factory, "thing", lambda folder: (folder / "a").write_text("1") and folder / "a")
    if change == "remove":
        path.unlink()
    elif change == "add":
        (path.parent / "b").write_text("new")
    else:
        path.write_text("2")
        os.utime(path, ns=(0, 0))
    assert [name.rpartition("/")[2] for name in changed_artefacts(factory)] == ["b" if change == "add" else "a"]


def test_half_of_it_is_not_taken_for_the_whole(factory):
    def fail(folder):
        (folder / "half").touch()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        made_once(factory, "thing", fail)
    with pytest.raises(FileExistsError):
        made_once(factory, "thing", lambda folder: folder)
