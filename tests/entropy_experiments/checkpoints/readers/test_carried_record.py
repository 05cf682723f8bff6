"""The record that this project's trainer leaves beside FSDP's files comes along when they are imported."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.console.doctor import examine
from entropy_experiments.console.import_source import import_run
from rl_training.errors import UserError
from rl_training.run.checkpoint_digests import checkpoint_digests
from rl_training.run.sidecar import SIDECAR_NAME, read_sidecar, write_sidecar
from tests.entropy_experiments.checkpoints.readers.test_import import moments_of
from tests.entropy_experiments.small_analysis import config


@pytest.fixture
def source(tiny_run: Path, tmp_path: Path) -> Path:
    """A checkpoint of the run as accelerate writes it under FSDP: the state by names in optimizer.bin."""
    folder = Path(shutil.copytree(tiny_run / "checkpoint-4", tmp_path / "fsdp" / "checkpoint-4"))
    sidecar = read_sidecar(folder)
    assert sidecar is not None
    names = [name for group in sidecar.optimizer_parameter_names for name in group]
    content = torch.load(folder / "optimizer.pt")
    (folder / "optimizer.pt").unlink()
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in content["param_groups"]]
    state = {names[n]: entry for n, entry in content["state"].items()}
    torch.save({"state": state, "param_groups": groups}, folder / "optimizer.bin")
    write_sidecar(folder, sidecar.model_copy(update={"sha256": checkpoint_digests(folder)}))
    return folder


def test_an_import_knows_what_the_run_recorded(tiny_run: Path, source: Path, tmp_path: Path) -> None:
    made = import_run(source, tmp_path / "run")[0]
    assert made.record.origins[SIDECAR_NAME] == str(source / SIDECAR_NAME) and made.to_give is None
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*that the policy is the one.*"
        )  # the witness was held against the policy
        found = load_checkpoint(made.folder, device="cpu")
    wanted = load_checkpoint(tiny_run / "checkpoint-4", device="cpu")
    assert found.record.learning_rates == wanted.record.learning_rates != ()
    assert all(torch.equal(a, b) for a, b in zip(moments_of(found), moments_of(wanted), strict=True))
    plans = [plan_sampling(checkpoint, config()) for checkpoint in (found, wanted)]
    assert plans[0].sampling_config == plans[1].sampling_config and plans[0].task.train == plans[1].task.train
    lines, healthy = examine(made.folder)
    assert healthy and not any("give checkpoint.task" in line for line in lines)


def test_a_record_of_other_files_is_refused(source: Path, tmp_path: Path) -> None:
    sidecar = read_sidecar(source)
    assert sidecar is not None
    names = [[*sidecar.optimizer_parameter_names[0][1:]], *sidecar.optimizer_parameter_names[1:]]
    write_sidecar(source, sidecar.model_copy(update={"optimizer_parameter_names": names}))
    with pytest.raises(UserError, match="has other parameter groups than the optimizer's state"):
        import_run(source, tmp_path / "run")
    write_sidecar(source, sidecar)
    with (source / "optimizer.bin").open("r+b") as file:
        file.seek(-30, 2)
        file.write(b"\1")
    with pytest.raises(UserError, match="optimizer.bin (is not the file that the trainer wrote|cannot be read)"):
        import_run(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()
