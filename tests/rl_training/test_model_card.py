"""The run's README.md says what was trained from what, with numbers of the run itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rl_training.run.model_card import FIGURE, write_model_card

ROWS = [
    {
        "step": step,
        "loss": 0.1,
        "entropy": 9.0,
        "entropy_probe/entropy": 2.0 / step,
        "entropy_probe/predicted": -0.1,
        "entropy_probe/measured": -0.2,
        "entropy_probe/cumulative_predicted": -0.1 * step,
        "entropy_probe/cumulative_predicted_se": 0.05,
        "entropy_probe/cumulative_watched": -0.2 * step,
        "entropy_probe/cumulative_watched_se": 0.1,
        "entropy_probe/cumulative_watched_df": 4.0,
        "entropy_probe/cumulative_measured": 7.0,
    }
    for step in (1, 2, 3)
]


def card(folder: Path, base: str = "org/model", rows: list[dict] = ROWS) -> tuple[dict, str]:
    write_model_card(folder, base, {"steps so far": 3}, rows)
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_it_tells_the_runs_own_numbers(tmp_path: Path) -> None:
    front, body = card(tmp_path)
    assert front["base_model"] == "org/model" and "| steps so far | 3 |" in body
    assert "2.000 nats per token at step 1 and 0.667 at step 3, on the probe's sequences" in body
    assert "predicted changes add up to −0.300, its measured changes add up to −0.600 nats per token" in body
    assert "7.0" not in body, "measured on the step's own sequences, where a pool was watched"
    assert (tmp_path / FIGURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("base", ["./model", "/data/org/model", "model", "a/b/c"])
def test_a_path_is_no_base_model(tmp_path: Path, base: str) -> None:
    front, body = card(tmp_path, base)
    assert "base_model" not in front and "a local model" in body and "None" not in body


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(tmp_path, "org/model")[0]


def test_without_entropy_nothing_is_said_of_it(tmp_path: Path) -> None:
    _, body = card(tmp_path, rows=[{"step": 1, "loss": 0.0, "entropy": float("nan")}])
    assert "Entropy" not in body and not (tmp_path / FIGURE).exists()
