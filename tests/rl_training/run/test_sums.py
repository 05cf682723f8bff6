"""Lists of digests: one flipped byte anywhere is seen, and what a kill leaves of a list does no harm."""

import subprocess
from pathlib import Path

import pytest

from rl_training.errors import UserError
from rl_training.run.sums import SUMS_NAME, add_sum, check_sum, check_sums, write_sums

FILES = {"a.bin": bytes(range(256)), "b.json": b"{}", "sub/c d.txt": "ä\n".encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path, FILES)
    return tmp_path


def test_it_is_the_format_of_sha256sum(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_NAME], cwd=folder, check=True)
    assert check_sums(folder, "do it again")


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(("name", "place"), [("a.bin", 0), ("a.bin", 255), ("b.json", 1), ("sub/c d.txt", 1)])
def test_a_flipped_bit_names_its_file(folder: Path, name: str, place: int) -> None:
    (folder / name).write_bytes(flipped(FILES[name], place))
    with pytest.raises(UserError, match=rf"{name} is not the file that was written .*; do it again$"):
        check_sums(folder, "do it again")


def test_every_flipped_bit_of_the_list_itself(folder: Path) -> None:
    content = (folder / SUMS_NAME).read_bytes()
    for place in range(len(content)):
        (folder / SUMS_NAME).write_bytes(flipped(content, place))
        with pytest.raises(UserError, match="do it again"):
            check_sums(folder, "do it again")


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "gone"])
def test_a_name_that_is_not_inside(folder: Path, name: str) -> None:
    with (folder / SUMS_NAME).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(UserError, match="not inside the folder|is gone"):
        check_sums(folder, "do it again")


def test_without_a_list_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    assert not check_sums(tmp_path, "") and not check_sum(tmp_path / "a", "")


def test_a_list_that_grows(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}").write_bytes(bytes([number]))
        add_sum(tmp_path / f"{number}")
    (tmp_path / "1").write_bytes(b"anew")
    with pytest.raises(UserError, match="1 is not the file that was written"):
        check_sum(tmp_path / "1", "")
    add_sum(tmp_path / "1")  # the last line counts
    assert check_sums(tmp_path, "") and check_sum(tmp_path / "1", "")
    (tmp_path / "other").write_bytes(b"")
    assert not check_sum(tmp_path / "other", "")


def test_a_kill_while_a_line_was_written(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
        add_sum(tmp_path / name)
    whole = (tmp_path / SUMS_NAME).read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        (tmp_path / SUMS_NAME).write_bytes(whole[:end])
        assert check_sum(tmp_path / "a", "") and not check_sum(tmp_path / "b", "")
        add_sum(tmp_path / "b")
        assert (tmp_path / SUMS_NAME).read_bytes() == whole


def test_a_list_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_bytes(b"1")
    (tmp_path / "run" / SUMS_NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="is a link"):
        add_sum(tmp_path / "run" / "a")
    assert (tmp_path / "victim").read_text() == "precious"
