"""`doctor` over a folder of every kind of checkpoint, held against what loading does: it promises nothing that is not so, and
refuses nothing that can be analysed.
"""

import functools
import re

import pytest

from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoint_zoo import ZOO, Zoo, build_zoo
from tests.warm_python import warm_run

TOLD = {
    "checkpoint": {"task": {"name": "chain_sum", "size": 8, "heldout_size": 8}, "device": "cpu"},
    "entropy_analysis": {"sampling": {"temperature": 1.0, "max_completion_length": 8}},
}


LIMITED = {"endless-pattern"}
"""Kinds whose loading runs into the time limit of a match, in a folder of their own."""


@pytest.fixture(scope="module")
def zoo(tiny_run, tmp_path_factory):
    """Name -> its folder."""
    root = tmp_path_factory.mktemp("zoo")
    built = build_zoo(root, Zoo(tiny_run.parent / "policy", tiny_run / "checkpoint-4"))
    (root / "limited").mkdir()
    return {name: (built / name).rename(root / "limited" / name) if name in LIMITED else built / name for name in ZOO}


@functools.cache
def table(folder):
    """Name -> its row, as the command prints it for the folders in `folder`."""
    done = warm_run("-m", "entropy_experiments", "doctor", folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == "checkpoint", done.stdout
    return {line.split()[0]: line for line in lines[1:]}


def verdict_of(path) -> tuple[str, str]:
    """(verdict, first refusal) by loading and planning, as an analysis does."""
    first = ""
    for verdict, with_adam in (("yes", True), ("without Adam", False)):
        try:
            checkpoint = load_checkpoint(path, device="cpu", require_optimizer=with_adam)
            told = FisherAnalysisConfig() if checkpoint.record.sidecar else validate_config(FisherAnalysisConfig, TOLD)
            plan_sampling(checkpoint, told)
            return verdict, first
        except UserError as error:
            first = first or str(error)
    return "no", first


@pytest.mark.long
def test_every_kind_has_its_row(zoo):
    assert table(zoo["ours"].parent).keys() == ZOO.keys() - LIMITED and len(ZOO) >= 25


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LIMITED else n for n in ZOO])
def test_the_row_says_what_loading_does(zoo, name):
    kind, row = ZOO[name], " ".join(table(zoo[name].parent)[name].split())
    loaded, refusal = verdict_of(zoo[name])
    assert loaded == kind.verdict, refusal
    printed = next(v for v in ("without Adam", "after import", "yes", "no") if f" {v} " in row)
    if printed == "after import":  # an analysis refuses it, and names the same command
        command = re.search(r"entropy-experiments import \S+ --output RUN", row)
        assert command is not None and command[0] in refusal
        printed = "no"
    assert printed == loaded, f"doctor says {printed}, loading {loaded}: {refusal}"
    for word in kind.words:
        assert word in row, row
    for word in kind.words[-1:] if loaded == "no" or refusal else ():
        assert word in refusal or word in row
