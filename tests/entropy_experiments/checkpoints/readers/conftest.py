"""Every format that the tests read, written once in a session; not to be changed."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.zero_layout import write_zero
from tests.shared_artefacts import made_once
from tests.tiny_policy import save_tiny_policy
from tests.two_processes import in_two_processes


@pytest.fixture(scope="session")
def formats(tmp_path_factory) -> Path:
    """Folder with `policy/`, `reference.pt` and one folder for each format."""

    def make(root: Path) -> Path:
        save_tiny_policy(root / "policy")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, written.FOLDER, str(root))
            in_two_processes(written.write_formats)
        reference = torch.load(root / "reference.pt")
        for stage in (1, 2, 3):
            write_zero(root / f"zero{stage}" / "checkpoint-4", reference, stage)
        state = Path(shutil.copytree(root / written.TRAINER, root / written.STATE))
        (state / "trainer_state.json").unlink()
        for name in ("optimizer", "scheduler"):
            (state / f"{name}.pt").rename(state / f"{name}.bin")
        return root

    return made_once(tmp_path_factory, "formats", make)


@pytest.fixture(scope="session")
def reference(formats):
    """weights, moments and groups by name, gathered by torch."""
    return torch.load(formats / "reference.pt")


@pytest.fixture
def copied(formats, tmp_path):
    """name -> a copy of that format, free to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(formats / name, tmp_path / Path(name).name))

    return copy
