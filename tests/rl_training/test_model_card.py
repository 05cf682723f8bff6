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
    assert "was 2.000 (no interval) at step 1 and 0.667 (no interval) at step 3, on the probe's sequences" in body
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


def test_the_ends_of_entropy_have_their_errors(tmp_path: Path) -> None:
    """Two steps of a few prompts each: 2.0 and 0.67 by themselves read like a fall that was shown."""
    errors = {"entropy_probe/entropy_se": 0.5, "entropy_probe/measured_df": 4.0}
    _, body = card(tmp_path, rows=[row | errors for row in ROWS])
    assert "was 2.000 [0.61, 3.39] at step 1 and 0.667 [−0.72, 2.05] at step 3" in body
    filtered = [{"step": s, "loss": 0.1, "entropy": 9.0} for s in (1, 2)]
    _, body = card(tmp_path, rows=filtered)
    assert "9.000 (no interval) at step 2, on the sequences trained on" in body


def test_the_probes_sums_are_over_the_same_steps(tmp_path: Path) -> None:
    """A gradient every other step: all predicted changes stood beside the sum of the half that was measured."""
    rows = [{name: value for name, value in row.items() if "watched" not in name} for row in ROWS]
    rows[-1] |= {
        "entropy_probe/cumulative_predicted_where_measured": -0.2,
        "entropy_probe/cumulative_measured": -0.19,
        "entropy_probe/measured_steps": 2.0,
    }
    _, body = card(tmp_path, rows=rows)
    assert (
        "predicted changes, over the 2 steps that were measured too, add up to −0.200, its measured changes, over the 2 steps "
        "that were measured too, add up to −0.190 nats per token" in body
    )
    assert "−0.300" not in body, "of three steps, of which two were measured"


def test_why_sums_and_ends_differ_is_said(tmp_path: Path) -> None:
    """2.040 to 1.266 beside a sum of −0.669 reads like a mistake."""
    words = "need not equal the difference of the two entropies: each entropy is that before its step"
    _, body = card(tmp_path)
    assert words in body and "the mean over the steps" not in body
    _, body = card(tmp_path, rows=ROWS[:1])
    assert words not in body, "one entropy has no difference"
    _, body = card(tmp_path, rows=[{k: v for k, v in row.items() if not k.startswith("entropy_probe")} for row in ROWS])
    assert words not in body, "nothing is summed"


def test_a_log_of_every_second_step_holds_means(tmp_path: Path) -> None:
    _, body = card(tmp_path, rows=[row | {"step": 2 * row["step"]} for row in ROWS])
    assert "on the probe's sequences, each the mean over the steps since the log's line before (" in body


def test_without_entropy_nothing_is_said_of_it(tmp_path: Path) -> None:
    _, body = card(tmp_path, rows=[{"step": 1, "loss": 0.0, "entropy": float("nan")}])
    assert "Entropy" not in body and not (tmp_path / FIGURE).exists()
