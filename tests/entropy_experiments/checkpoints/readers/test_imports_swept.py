"""A run that was imported is swept, and its analyses compared, by the commands as for any other."""

import json
import os
import shutil
from pathlib import Path

import pytest

from entropy_experiments.console.import_source import import_run
from tests.entropy_experiments.checkpoints.readers.test_import import TOLD
from tests.entropy_experiments.checkpoints.readers.test_refusals import resave
from tests.entropy_experiments.sweep.test_sweep import REAL
from tests.warm_python import UNPAINTED, warm_run


@pytest.mark.long
def test_commands_take_a_run_that_was_imported(formats: Path, copied, tmp_path: Path) -> None:
    """Two steps in one folder, as OpenRLHF keeps them: imported together, swept, and the sweep's two analyses compared."""
    folder = copied("zero2/checkpoint-4")
    shutil.copytree(folder / "global_step4", folder / "global_step8")
    resave("global_step8/mp_rank_00_model_states.pt", lambda c: c.update(global_steps=8))(folder)
    made = import_run(folder, tmp_path / "run", str(formats / "policy"))
    assert [one.folder.name for one in made] == ["checkpoint-4", "checkpoint-8"]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def typed(*arguments: object) -> None:
        done = warm_run("-m", "entropy_experiments", *arguments, env=env, prelude=UNPAINTED)
        assert done.returncode == 0, done.stderr

    typed("sweep", tmp_path / "run", *REAL, *TOLD, "--folder", tmp_path / "out")
    analyses = sorted(path for path in (tmp_path / "out" / "checkpoints").iterdir() if path.is_dir())
    assert [path.name for path in analyses] == ["run_checkpoint-4", "run_checkpoint-8"]
    typed("compare", *analyses, "--output", tmp_path / "compared")
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert len(found["sides"]) == 2 and (tmp_path / "compared" / "comparison.html").is_file()
