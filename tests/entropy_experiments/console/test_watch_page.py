"""The page that grows with a run: its data, its addresses, and who may ask for them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from entropy_experiments.cli import watch
from entropy_experiments.console.watch import history_of, watched
from rl_training.errors import UserError


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, "loss": 0.1, "entropy": 2.0 / step, "reward": 0.2, **values}) + "\n"


def get(address: str, host: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_it_grows_with_the_log(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert history_of(run)["plot"] is None, "a run that has not begun is waited for"
    run.mkdir()
    log = run / "metrics.jsonl"
    log.write_text(line(1) + line(2, **{"entropy_probe/predicted": -0.1}) + '{"step": 3, "entr')
    found = history_of(run)
    assert found["words"] == "run: step 2" and found["plot"]["data"]
    assert '"$' not in json.dumps(found["plot"]), "a colour of the report's themes, which this page has not"
    with watched(run) as address:
        log.write_text(line(1) + line(2) + line(3))
        status, text = get(f"{address}history.json")
        assert status == 200 and json.loads(text)["words"] == "run: step 3"


def test_a_run_of_plain_trl_is_read_from_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    history = [json.loads(line(step)) for step in (1, 2, 3, 4)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": history}))
    assert history_of(tmp_path)["words"].endswith("step 4")


def test_it_answers_this_machine_and_its_own_addresses_alone(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with watched(tmp_path) as address:
        assert address.startswith("http://127.0.0.1:")
        assert get(address)[0] == 200 and "plotly.js" in get(address)[1]
        for other in ("secret.txt", "../etc/passwd", "history.json?x"):
            assert get(address + other)[0] == 404
        assert get(address, host="attacker.example")[0] == 403
        port = int(address.rsplit(":", 1)[1].rstrip("/"))
        with pytest.raises(UserError, match="--port"), watched(tmp_path, port):
            pass


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"log_history": 3}', "[" * 200_000], ids=["list", "null", "number", "deep"]
)
def test_a_log_that_is_none_keeps_the_page_waiting(tmp_path: Path, text: str) -> None:
    """The page says that it waits, not that the run is no longer watched."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(text)
    assert history_of(tmp_path)["plot"] is None
    (tmp_path / "metrics.jsonl").write_text(f"{text}\n")
    assert history_of(tmp_path)["plot"] is None


def test_the_command_says_what_the_address_is_for(tmp_path: Path, monkeypatch, capsys) -> None:
    address = "http://127.0.0.1:5/"
    monkeypatch.setattr("entropy_experiments.console.watch.watch", lambda run, port, told: told(address))
    watch(tmp_path, 0)
    assert capsys.readouterr().out == f"open in a browser: {address}  (Ctrl-C ends it)\n"
