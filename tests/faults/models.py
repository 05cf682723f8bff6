"""Models, their tokenizers and rewards, as a stranger may have them: refused in one line, or taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rl_training.models.load import load_model_and_tokenizer
from rl_training.tasks.own_rewards import import_reward
from tests.faults.cases import EITHER, REFUSED, Case
from tests.faults.damaged_files import DAMAGES, JSON_CONTENTS, writing

# Files that a model may lack, and those whose damage nobody can tell from another content: no traceback and no wait, then.
_MAY_BE_READ = ("generation_config.json", "chat_template.jinja", "tokenizer", "special_tokens_map.json")
_SETTINGS: dict[str, dict[str, Any]] = {
    "a name of nothing": {"name": "/nowhere"}, "an empty name": {"name": ""}, "a name with NUL": {"name": "a\0b"},
    "a folder without a model": {"name": "/proc/self/fd"}, "a precision": {"dtype": "int8"}, "a device": {"device": "tpu:0"},
    "a device that is not there": {"device": "cuda:99"}, "half a character": {"name": "\ud800"},
}  # fmt: skip
_REWARDS: dict[str, str] = {
    "no function": "reward = 3", "no such name": "x = 1", "not Python": "def reward(:", "raises on import": "1 / 0",
    "ends the process on import": "import sys; sys.exit(3)", "takes nothing": "def reward(): return []",
    "needs more": "def reward(prompts, completions, gold, **k): return [0.0]",
}  # fmt: skip
_RESULTS: dict[str, str] = {
    "raises": "1 / 0", "ends the process": "sys.exit(0)", "a text": "'a'", "too few": "[0.0]", "too many": "[0.0] * 3",
    "texts": "['a', 'b']", "NaN": "[float('nan'), 0.0]", "infinity": "[float('inf'), 0.0]", "a huge number": "[10**400, 0.0]",
    "nothing": "None", "a coroutine": "later()", "complex numbers": "[1j, 0.0]", "lists": "[[1], [2]]",
    "an exception without words": "(_ for _ in ()).throw(Exception())", "too deep": "reward(**locals())",
}  # fmt: skip


def model_cases(policy: Path) -> Iterator[Case]:
    """policy: a folder of save_pretrained; each case copies it, damages one file and loads it."""
    for what, settings in _SETTINGS.items():
        yield Case("models", what, lambda folder, s=settings: load_model_and_tokenizer(**{"name": str(policy), **s}))
    for name in sorted(path.name for path in policy.iterdir()):
        extra = JSON_CONTENTS if name.endswith(".json") else {}
        for what, damage in {**DAMAGES, **{k: writing(v) for k, v in extra.items()}}.items():
            seen = not name.startswith(_MAY_BE_READ) and not _harmless(name, what)
            yield Case("models", f"{name}: {what}", _loading(policy, name, damage), "", REFUSED if seen else EITHER)


def _harmless(name: str, what: str) -> bool:
    """A bit of a weight or of a number is a value like others, where nothing says what it was."""
    return what.startswith(("a bit", "a byte")) or (name == "config.json" and what == "its last byte missing")


def reward_cases() -> Iterator[Case]:
    """Functions that cannot be used, and what they may do and return."""
    for what, source in _REWARDS.items():
        yield Case("rewards", what, _reward(source), "reward")
    for what, value in _RESULTS.items():
        body = f"import sys\nasync def later(): return [0.0, 0.0]\ndef reward(prompts, completions, **rest): return {value}\n"
        yield Case("rewards", f"returns {what}", _reward(body), "reward")


def _reward(source: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / "reward.py").write_text(source)
        function: Any = import_reward(f"{folder / 'reward.py'}:reward")
        function(prompts=["a", "a"], completions=["b", "c"], answer=["1", "1"], prompt_index=[0, 0])

    return act


def _loading(policy: Path, name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        copied = Path(shutil.copytree(policy, folder / "policy"))
        damage(copied / name)
        load_model_and_tokenizer(str(copied), device="cpu")

    return act
