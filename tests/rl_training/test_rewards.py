"""Reward functions, on plain and on conversational completions."""

import threading
from pathlib import Path
from typing import Any

import pytest

from rl_training import rewards
from rl_training.errors import UserError


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("wrap", [str, _chat])
@pytest.mark.parametrize(
    ("reward", "completion", "answer", "expected"),
    [
        (rewards.exact, " 7\n", "7", 1.0),
        (rewards.exact, "7.", "7", 0.0),
        (rewards.exact, "The answer is 7", "7", 0.0),
        (rewards.exact, "", "7", 0.0),
        (rewards.last_number, "7", "7", 1.0),
        (rewards.last_number, "4 + 3 = 7.", "7", 1.0),
        (rewards.last_number, "The answer is: **7**\n", "7.0", 1.0),
        (rewards.last_number, "7 = 4 + 3", "7", 0.0),
        (rewards.last_number, "3 - 7 = -4", "-4", 1.0),
        (rewards.last_number, "3 - 7 = \u22124", "-4", 1.0),
        (rewards.last_number, "3-7", "7", 1.0),
        (rewards.last_number, "in all 1,234.50 metres", "1234.5", 1.0),
        (rewards.last_number, "first 1, 2", "2", 1.0),
        (rewards.last_number, "seventeen", "17", 0.0),
        (rewards.last_number, "17", "7", 0.0),
        (rewards.last_number, "", "7", 0.0),
        (rewards.math_verify, "The answer is 7", "7", 1.0),
        (rewards.math_verify, "It is \\boxed{\\frac{1}{2}}.", "0.5", 1.0),
        (rewards.math_verify, "$\\sqrt{4}$", "\\frac{4}{2}", 1.0),
        (rewards.math_verify, "It is 8", "7", 0.0),
        (rewards.math_verify, "no number at all", "7", 0.0),
        (rewards.math_verify, "", "7", 0.0),
    ],
)
def test_built_in_rewards(reward: Any, wrap: Any, completion: str, answer: str, expected: float) -> None:
    values = reward(prompts=["?"], completions=[wrap(completion)], answer=[answer], prompt_index=[0])
    assert values == [expected] and type(values[0]) is float


def test_completion_text_of_parts_and_of_nothing() -> None:
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert rewards.completion_text(parts) == "ab"
    assert rewards.completion_text([]) == rewards.completion_text(_chat("")) == ""


def test_math_verify_works_outside_the_main_thread() -> None:
    result: list[float] = []
    thread = threading.Thread(target=lambda: result.extend(rewards.math_verify(["?"], ["It is 1/2"], answer=["0.5"])))
    thread.start()
    thread.join()
    assert result == [1.0]


def test_a_scorer_that_raises_gives_nothing_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Scorer:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            return float(int(answer) == entry["answer"])

    reward = rewards.score_answer(Scorer(), {3: {"answer": 7}}, "sevens")
    values = reward(prompts=["?"] * 3, completions=["7", "seven", "eight"], prompt_index=[3, 3, 3])
    assert values == [1.0, 0.0, 0.0]
    assert len(caplog.records) == 1 and "sevens cannot score 'seven'" in caplog.text


def test_the_last_answer_tag_counts() -> None:
    class Echo:
        def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
            return float(answer == "b c")

    reward = rewards.score_answer(Echo(), {0: {}}, "echo")
    completion = "<answer>a</answer> or <answer> b c\n</answer> ."
    assert reward(prompts=["?"], completions=[_chat(completion)], prompt_index=[0]) == [1.0]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards.py").write_text(
        "number = 3\n"
        "def good(prompts, completions, **columns): return [len(text) for text in completions]\n"
        "def short(prompts, completions, **columns): return [1.0]\n"
        "def none(prompts, completions, **columns): return [None] * len(completions)\n"
        "def nan(prompts, completions, **columns): return [float('nan')] * len(completions)\n"
        "def rigid(prompts, completions): return [0.0] * len(completions)\n"
    )
    (tmp_path / "broken_rewards.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_rewards"


def test_own_reward_is_imported_and_its_result_is_checked(own_module: str) -> None:
    reward = rewards.import_reward(f"{own_module}:good")
    assert reward(prompts=["?", "?"], completions=["ab", "c"], answer=["", ""]) == [2.0, 1.0]
    assert reward.__name__ == "good"
    for name, words in {"short": "1 rewards for 2", "none": "returned None", "nan": "returned nan"}.items():
        with pytest.raises(UserError, match=words):
            rewards.import_reward(f"{own_module}:{name}")(prompts=["?", "?"], completions=["a", "b"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("own_rewards:missing", "has no 'missing'"),
        ("own_rewards:number", "is not a function"),
        ("own_rewards:rigid", "must take \\*\\*"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("broken_rewards:f", "cannot import 'broken_rewards'"),
        (":f", "cannot import ''"),
    ],
)
def test_own_rewards_that_cannot_be_used(own_module: str, path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rewards.import_reward(path)
