"""Descriptions in a checkpoint that are no descriptions: named in one line, and never read without a limit."""

import json
from pathlib import Path

import pytest

from entropy_experiments.checkpoints.folder import Adapter, read_json
from entropy_experiments.checkpoints.policy_outline import outline_policy
from rl_training.errors import UserError
from rl_training.files import LARGEST_JSON
from tests.entropy_experiments.checkpoint_edits import edit_json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": []}, r"peft_type \[\] is no adapter that the installed PEFT knows"),
        ({"task_type": "0"}, r"adapter_config\.json is damaged \(Invalid task type"),
    ],
    ids=str,
)
def test_an_adapter_of_no_kind(checkpoint_copy: Path, changes: dict, words: str) -> None:
    edit_json(checkpoint_copy / "adapter_config.json", lambda content: content.update(changes))
    base = json.loads((checkpoint_copy / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.raises(UserError, match=words):
        outline_policy(checkpoint_copy, base, Adapter(checkpoint_copy, "default"), reproducible=True)


def test_a_description_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    with path.open("wb") as file:
        file.truncate(LARGEST_JSON + 1)  # a hole: it takes no room
    with pytest.raises(UserError, match=r"trainer_state\.json has 1,073,741,825 bytes, and no run writes more"):
        read_json(path)
