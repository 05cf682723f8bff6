"""Reward functions, on plain and on conversational completions."""

import threading
from typing import Any

import pytest

from rl_training.tasks import rewards


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
