"""Rewards of one's own: TRL's contract in full, found by path, and no way to end a run without a word."""

import asyncio
import dataclasses
import importlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_training.errors import UserError
from rl_training.tasks import own_rewards
from rl_training.tasks.own_rewards import import_reward
from rl_training.tasks.reward_calls import total_rewards
from rl_training.tasks.sandbox.scoring import RewardLimits

_FUNCTIONS = """
import asyncio, functools, sys

number = 3
def good(prompts, completions, **columns): return [len(text) for text in completions]
def some(prompts, completions, **columns): return [None, 2]
def short(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float('nan')] * len(completions)
def huge(prompts, completions, **columns): return [1e308] * len(completions)
def words(prompts, completions, **columns): return ["1"] * len(completions)
def nothing(prompts, completions, **columns): return None
def rigid(prompts, completions): return [0.0] * len(completions)
def whole(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, prompt_index):
    log_metric("mean", 1.0)
    log_extra("seen", list(completions))
    return [float(trainer_state.global_step)] * len(completions)
def wants_more(prompts, completions, difficulty, **columns): return [0.0] * len(completions)
def by_position(prompts, completions, /, **columns): return [0.0] * len(completions)
def leaves(prompts, completions, **columns): sys.exit(0)
def fails(prompts, completions, **columns): return [1 / 0]
async def later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [1.0, None]
async def later_leaves(prompts, completions, **columns): sys.exit(0)
def forgets_async(prompts, completions, **columns): return later(prompts, completions)
class Judge:
    async def __call__(self, prompts, completions, **columns): return [0.5] * len(completions)
judge = Judge()
def hangs(prompts, completions, **columns):
    while "ab" in completions: pass
    return [1.0] * len(completions)
def backtracks(prompts, completions, **columns):
    import re
    return [float(bool(re.match("(a|a?)+$", "a" * 100 + text))) for text in completions]
def swallows(prompts, completions, **columns): return [float(len(bytes(1 << 34)))] * len(completions)
def kills_itself(prompts, completions, **columns):
    import os
    os._exit(0)
bound = functools.partial(good, extra=1)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards_for_tests.py").write_text(_FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("def (:\n")
    (tmp_path / "leaving_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    return "own_rewards_for_tests.py"


def _call(reward: Any, count: int = 2) -> Any:
    columns = {"answer": ["1"] * count, "prompt_index": [0] * count, "completion_ids": [[1]] * count}
    given = {"trainer_state": None, "log_extra": print, "log_metric": print}
    return reward(prompts=["?"] * count, completions=["ab", "c"][:count], **columns, **given)


def test_a_file_is_found_by_its_path_and_the_working_directory_is_not_searched(here: str) -> None:
    before = list(sys.path)
    assert _call(import_reward(f"{here}:good")) == [2.0, 1.0]
    assert _call(import_reward(f"{Path(here).resolve()}:good")) == [2.0, 1.0]
    with pytest.raises(UserError, match=r"cannot import.*task\.reward=own_rewards_for_tests\.py:good"):
        import_reward("own_rewards_for_tests:good")
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "expected", "shown"),
    [
        ("good", [2.0, 1.0], "good"),
        ("some", [None, 2.0], "some"),
        ("bound", [2.0, 1.0], "good"),
        ("later", [1.0, None], "later"),
        ("judge", [0.5, 0.5], "Judge"),
    ],
)
def test_trls_contract(here: str, name: str, expected: list[float | None], shown: str) -> None:
    from trl.trainer.utils import get_callable_name, is_async_callable

    reward = import_reward(f"{here}:{name}")
    found = _call(reward)
    assert (asyncio.run(found) if is_async_callable(reward) else found) == expected
    assert is_async_callable(reward) == (name in ("later", "judge"))
    assert get_callable_name(reward) == shown


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("short", "1 rewards for 2"),
        ("nan", "returned nan for completion 0"),
        ("huge", "returned 1e\\+308 .* finite in float32"),
        ("words", "returned '1'"),
        ("nothing", "returned None: expected a list"),
        ("leaves", "leaves called exit\\(\\) on 2 completions, the first 'ab'"),
        ("fails", "raised ZeroDivisionError.*own_rewards_for_tests.py, line \\d+"),
        ("forgets_async", "define it with async def"),
    ],
)
def test_what_is_returned_is_checked_and_what_fails_is_named(here: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        _call(import_reward(f"{here}:{name}"))
    assert "\n" not in str(caught.value)


def test_exit_in_an_async_reward_ends_neither_loop_nor_run(here: str) -> None:
    with pytest.raises(UserError, match="called exit"):
        asyncio.run(_call(import_reward(f"{here}:later_leaves")))


def test_failures_give_zero_where_that_is_configured(here: str, caplog: pytest.LogCaptureFixture) -> None:
    limits = RewardLimits(on_error="zero")
    for name in ("fails", "leaves"):
        caplog.clear()
        reward = import_reward(f"{here}:{name}", limits=limits)
        assert _call(reward) == _call(reward) == [0.0, 0.0]
        assert len(caplog.records) == 1 and f":{name} " in caplog.text and "'ab'" in caplog.text
    with pytest.raises(UserError, match="1 rewards for 2"):  # a wrong length is no failure of a completion
        _call(import_reward(f"{here}:short", limits=limits))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("own_rewards_for_tests.py:missing", "has no 'missing'"),
        ("own_rewards_for_tests.py:number", "is not a function"),
        ("own_rewards_for_tests.py:rigid", r"must take \*\*kwargs, or also completion_ids, trainer_state"),
        ("own_rewards_for_tests.py:wants_more", "asks for 'difficulty', which the task does not have: it has prompts"),
        ("own_rewards_for_tests.py:by_position", "called with keywords"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("broken_rewards.py:f", "cannot import 'broken_rewards.py'"),
        ("leaving_rewards.py:f", "cannot import 'leaving_rewards.py': SystemExit"),
        ("none.py:f", "none.py is no file"),
        ("./:f", "is no file"),
        (":f", "cannot import ''"),
    ],
)
def test_what_cannot_be_used_is_refused_before_training(here: str, path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        import_reward(path)
    assert "\n" not in str(caught.value)


def test_a_function_without_kwargs_is_legal_where_it_takes_all_columns(here: str) -> None:
    class State:
        global_step = 7

    functions = [import_reward(f"{here}:whole"), import_reward(f"{here}:later"), import_reward(f"{here}:some")]
    columns = {"answer": ["1", "2"], "prompt_index": [0, 1]}
    arguments = (["?", "?"], ["ab", "c"], [[1], [2]], columns)
    assert total_rewards(functions, *arguments, trainer_state=State()) == [8.0, 9.0]
    with pytest.raises(UserError, match=r"trainer_state\.global_step.*no trainer_state\.json"):
        total_rewards(functions, *arguments)


def test_none_is_no_zero_and_async_works_inside_a_loop(here: str) -> None:
    functions = [import_reward(f"{here}:{name}") for name in ("later", "some")]

    async def in_a_loop() -> list[float | None]:
        return total_rewards(functions, ["?", "?"], ["ab", "c"], [[1], [2]], {})

    assert asyncio.run(in_a_loop()) == [1.0, 2.0]
    assert total_rewards(functions[:1], ["?", "?"], ["ab", "c"], [[1], [2]], {}) == [1.0, None]
    with pytest.raises(UserError, match="called exit"):
        total_rewards([lambda **_: sys.exit(0)], ["?"], ["a"], [[1]], {})


def test_a_slow_function_is_named(here: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(own_rewards, "SECONDS_UNTIL_A_WARNING", 0.02)
    Path("slow.py").write_text("import time\ndef f(prompts, completions, **_): time.sleep(0.2); return [1, 1]\n")
    with caplog.at_level(logging.WARNING):
        assert _call(import_reward("slow.py:f")) == [1.0, 1.0]
    time.sleep(0.05)
    assert "slow.py:f has been running" in caplog.text and len(caplog.records) == 1


@pytest.fixture
def in_a_process(here: str) -> Any:
    limits = RewardLimits(seconds=1.0, memory=1 << 28, on_error="zero", own_process=True)
    return lambda name, **changes: import_reward(f"{here}:{name}", limits=dataclasses.replace(limits, **changes))


def test_a_function_in_a_child_process_keeps_the_contract(in_a_process: Any) -> None:
    assert _call(in_a_process("good")) == [2.0, 1.0]
    assert _call(in_a_process("later")) == [1.0, None]
    said: list[Any] = []
    given = {"trainer_state": SimpleNamespace(global_step=7), "log_extra": lambda *a: said.append(a)}
    reward, columns = in_a_process("whole"), {"answer": ["1"], "prompt_index": [0], "completion_ids": [[1]]}
    found = reward(prompts=["?"], completions=["a"], **columns, **given, log_metric=lambda *a: said.append(a))
    assert found == [7.0] and said == [("mean", 1.0), ("seen", ["a"])]


@pytest.mark.long
def test_what_the_child_imports_to_read_its_arguments_is_no_part_of_the_call(here: str) -> None:
    """As the trainer's state does: its class lies in a library that takes longer to load than the limit."""
    Path("slow_library.py").write_text("import time\ntime.sleep(2.5)\nclass State:\n    pass\n")
    limits = RewardLimits(seconds=1.0, on_error="raise", own_process=True)
    sys.path.insert(0, str(Path.cwd()))
    try:
        state = importlib.import_module("slow_library").State()
        reward = import_reward(f"{here}:good", limits=limits)
        given = {"answer": ["1"], "prompt_index": [0], "completion_ids": [[1]]}
        assert reward(prompts=["?"], completions=["ab"], trainer_state=state, **given) == [2.0]
    finally:
        sys.path.remove(str(Path.cwd()))
        del sys.modules["slow_library"]


@pytest.mark.long
def test_a_call_ends_even_where_its_caller_was_killed(here: str) -> None:
    """Nobody is left to end the child at its limit but the kernel."""
    script = (
        "from rl_training.tasks.reward_process import RewardProcess\n"
        "from rl_training.tasks.sandbox.scoring import RewardLimits\n"
        f"call = RewardProcess({str(Path(here).resolve()) + ':tells_and_hangs'!r}, RewardLimits(seconds=1.0))\n"
        "call(prompts=['?'], completions=['ab'])\n"
    )
    started = Path("started")
    source = Path(here).read_text()
    Path(here).write_text(
        source
        + f"""
def tells_and_hangs(prompts, completions, **columns):
    import os, pathlib, re
    pathlib.Path({str(started.resolve())!r} + ".part").write_text(str(os.getpid()))
    os.replace({str(started.resolve())!r} + ".part", {str(started.resolve())!r})
    re.match("(a|a?)+$", "a" * 100 + "b")
"""
    )
    root = str(Path(own_rewards.__file__).parents[2])
    caller = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root})
    wait_for(started.exists)
    pid = int(started.read_text())
    caller.kill()
    caller.wait()
    wait_for(lambda: not lives(pid))


def lives(pid: int) -> bool:
    """A process that has ended and that nobody waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hangs", "took longer than 1 s"),
        ("backtracks", "took longer than 1 s"),  # in C, where no signal handler and no other thread gets a word in
        ("swallows", "beside what it takes when loaded"),
        ("kills_itself", "ended its process"),
        ("fails", "ZeroDivisionError"),
        ("leaves", "ended its process"),
    ],
)
def test_a_function_in_a_child_process_is_ended_at_its_limit(in_a_process: Any, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _call(in_a_process(name, on_error="raise"))
    reward = in_a_process(name)
    assert _call(reward) == [0.0, 0.0]
    if name == "hangs":  # another child answers what does not hang
        columns = {"answer": ["1"], "prompt_index": [0], "completion_ids": [[1]]}
        assert reward(prompts=["?"], completions=["c"], **columns) == [1.0]
