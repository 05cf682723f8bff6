"""Files of strangers: nothing in them is executed, and whatever is wrong with them ends in one line, soon."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_experiments.checkpoints.readers.allowed_names import CHECKPOINT_NAMES, METADATA_NAMES
from entropy_experiments.checkpoints.readers.dcp_folder import open_dcp
from entropy_experiments.checkpoints.readers.inert_pickle import Damaged, read_pickle
from entropy_experiments.checkpoints.readers.layouts import find_source
from entropy_experiments.checkpoints.readers.torch_file import read_torch_file
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written


class Bomb:
    """Makes a file where it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


class Attribute(Bomb):
    def __reduce__(self):
        return getattr, (self.mark, "touch")


class Evaluated(Bomb):
    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.mark)!r}).touch()",)


class Imported(Bomb):
    def __reduce__(self):
        return __import__, ("antigravity",)


HOSTILE = (Bomb, Attribute, Evaluated, Imported)
# A file of each kind that is opened as a pickle.
KINDS = {
    "verl weights": (written.VERL, "model_*_rank_1.pt"),
    "verl optimizer": (written.VERL, "optim_*_rank_0.pt"),
    "FSDP1 optimizer": (written.FSDP1, "optim_*_rank_1.pt"),
    "accelerate weights": (written.FULL, "pytorch_model_fsdp.bin"),
    "accelerate optimizer": (written.FULL, "optimizer.bin"),
    "accelerate by rank": (written.RANKED, "optimizer_0_rank1.bin"),
    "accelerate schedule": (written.SHARDED, "scheduler.pt"),
    "DCP description": (written.PRIME, ".metadata"),
    "DCP of accelerate": (written.SHARDED, "optimizer_0/.metadata"),
    "OpenRLHF extra": (written.OPENRLHF, "extra_state.pt"),
    "ZeRO optimizer": ("zero2/checkpoint-4", "zero_pp_rank_1_*"),
    "ZeRO names": ("zero3/checkpoint-4", "zero_pp_rank_0_*model*"),
    "Trainer": (written.TRAINER, "optimizer.pt"),
    "VeOmni optimizer": (written.VEOMNI, "optim_*_rank_0.pt"),
    "NeMo-RL optimizer": (written.NEMO, "optimizer/.metadata"),
    "save_state": (written.STATE, "optimizer.bin"),
    "save_state schedule": (written.STATE, "scheduler.bin"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_of_each_kind_runs_nothing(copied, tmp_path, kind):
    name, pattern = KINDS[kind]
    folder = copied(name)
    path = sorted(folder.rglob(pattern))[0]
    for number, hostile in enumerate(HOSTILE):
        mark = tmp_path / f"ran-{number}"
        content = {"state": {0: hostile(mark)}, "param_groups": [], "model": hostile(mark)}
        if path.name == ".metadata":
            path.write_bytes(pickle.dumps(content, protocol=4))
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match="would have to be executed") as refused:
            find_source(folder).read()
        assert path.name in str(refused.value) and "\n" not in str(refused.value)
        assert not mark.exists()


def test_a_hostile_state_beside_the_shards_runs_nothing_and_is_said(copied, tmp_path):
    """Users' own state of any class may lie in extra_state: the checkpoint is read without it."""
    folder = copied(written.VERL)
    path = folder / "actor" / "extra_state_world_size_2_rank_0.pt"
    torch.save({"lr_scheduler": Bomb(tmp_path / "ran")}, path)
    state = find_source(folder).read()
    assert "would have to be executed" in state.notes[0] and state.scheduler is None and state.step == written.STEPS
    assert not (tmp_path / "ran").exists()


def test_the_mark_would_have_been_made(tmp_path):
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_an_object_inside_a_dcp_tree_runs_nothing(copied, tmp_path):
    """Numbers of a DCP tree are pickles of their own inside its files."""
    folder = copied(written.PRIME)
    tree = open_dcp(folder / "trainer")
    piece = tree.objects["app.progress.step"]
    path = folder / "trainer" / piece.file
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "ran"), bomb)
    data = bytearray(path.read_bytes())
    data[piece.start : piece.start + piece.length] = bomb.getvalue().ljust(piece.length, b"\0")[: piece.length]
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        find_source(folder).read()
    assert not (tmp_path / "ran").exists()


def test_a_path_out_of_the_folder_is_refused(copied):
    folder = copied(written.PRIME) / "trainer"
    path = folder / ".metadata"
    data = path.read_bytes()
    assert b"__0_0.distcp" in data
    path.write_bytes(data.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(UserError, match="names a file outside its folder"):
        open_dcp(folder)


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "a key that takes for ever to hash": b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.",
        "no end": b"\x80\x02}" * 1000,
        "nothing": b"",
        "an empty stack": b"\x80\x020000.",
        "a memo that is not there": b"\x80\x02h\x05.",
        "marks alone": b"\x80\x02" + b"(" * 10_000 + b".",
        "a length beyond the file": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id of text": b"\x80\x02Pabc\n.",
        "a call of no function": b"\x80\x02K\x01)R.",
        "an instance by opcode": b"\x80\x02(cos\nsystem\no.",
        "an old instance": b"(ios\nsystem\n.",
        "items of a number": b"\x80\x02K\x01(K\x01K\x02u.",
    }.items(),
)
def test_opcodes_that_torch_does_not_write(name, data):
    for allowed in (CHECKPOINT_NAMES, METADATA_NAMES):
        with pytest.raises(Damaged):
            read_pickle(data, allowed)


def test_an_archive_that_claims_more_than_it_holds(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 22))
    with pytest.raises(UserError, match="compressed|more than fits"):
        read_torch_file(path)
    torch.save({"a": torch.zeros(4)}, path)
    huge = path.read_bytes().replace(b"K\x04\x85", b"J\xff\xff\xff", 1)
    path.write_bytes(huge)
    with pytest.raises(UserError):
        read_torch_file(path)


def test_a_tensor_that_repeats_itself_without_end(tmp_path):
    torch.save(torch.zeros(1).expand(10**9), tmp_path / "expanded.pt")
    with pytest.raises(UserError, match="repeats its values"):
        read_torch_file(tmp_path / "expanded.pt")


@pytest.mark.parametrize(
    "values", [torch.zeros(3, 4).t(), torch.arange(24.0).reshape(2, 3, 4)[:, 1], torch.zeros(0, 3)]
)
def test_views_are_read_as_they_are(tmp_path, values):
    torch.save(values, tmp_path / "view.pt")
    assert torch.equal(read_torch_file(tmp_path / "view.pt").read(), values)


class Seeds(tuple):
    """Of a short name, for hypothesis prints what a test is called with."""

    def __repr__(self) -> str:
        return "seeds"


@pytest.fixture(scope="module")
def seeds(formats):
    """Files whose headers are fuzzed: an archive of torch, a description of DCP."""
    archive = io.BytesIO()
    torch.save(
        {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}, archive
    )
    return Seeds((archive.getvalue(), (formats / written.SHARDED / "optimizer_0" / ".metadata").read_bytes()))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    which=st.booleans(),
)
def test_fuzzed_headers_end_in_one_line(seeds, tmp_path_factory, changes, which):
    data = bytearray(seeds[which])
    for place, value in changes:
        data[int(place * len(data))] = value
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    path = folder / (".metadata" if which else "file.pt")
    path.write_bytes(data)
    try:
        open_dcp(folder) if which else read_torch_file(path)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
