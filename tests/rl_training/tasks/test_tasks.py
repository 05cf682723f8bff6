"""Tasks: distinct prompts, disjoint splits, stable numbers, and errors that name the remedy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rl_training.config import TaskConfig
from rl_training.errors import UserError
from rl_training.tasks import json_lines
from rl_training.tasks.task import load_task

TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def _chain_sum(**changes: Any) -> TaskConfig:
    return TaskConfig(**{"arguments": TWO_DIGITS, "size": 20, "heldout_size": 10, "reward": "exact"} | changes)


def _jsonl(tmp_path: Path, *lines: Any, **changes: Any) -> TaskConfig:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return TaskConfig(**{"source": "jsonl", "path": str(path), "size": 1, "heldout_size": 0} | changes)


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row["prompt"]) for row in rows]


def test_prompts_are_distinct_disjoint_and_serialisable() -> None:
    task = load_task(_chain_sum(size=128, heldout_size=64))
    assert (len(task.train), len(task.heldout)) == (128, 64)
    rows = task.train + task.heldout
    assert len(set(_texts(rows))) == len({row["prompt_index"] for row in rows}) == 192
    assert json.loads(json.dumps(rows)) == rows
    assert {tuple(sorted(row)) for row in rows} == {("answer", "prompt", "prompt_index")}


def test_equal_configs_give_equal_tasks_and_other_seeds_other_ones() -> None:
    first, again, other = load_task(_chain_sum()), load_task(_chain_sum()), load_task(_chain_sum(seed=1))
    assert (first.train, first.heldout) == (again.train, again.heldout)
    shared = set(_texts(first.train)) & set(_texts(other.train))
    assert len(shared) < 10, "seeds 0 and 1 share most problems: reasoning-gym adds the index to the seed"


@pytest.mark.parametrize("source", ["reasoning_gym", "jsonl"])
def test_a_prompt_keeps_its_number_when_splits_grow(tmp_path: Path, source: str) -> None:
    lines = [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(40)]
    make = _chain_sum if source == "reasoning_gym" else lambda **sizes: _jsonl(tmp_path, *lines, **sizes)
    small, large = load_task(make(size=10, heldout_size=5)), load_task(make(size=10, heldout_size=20))
    assert small.train == large.train
    assert small.heldout == large.heldout[:5]


def test_an_exhausted_data_set_is_named_with_sizes_that_fit() -> None:
    with pytest.raises(UserError, match="has only 200 distinct prompts.* = 300 are wanted") as caught:
        load_task(_chain_sum(size=200, heldout_size=100))
    assert "task.size=134 task.heldout_size=66" in str(caught.value)
    load_task(_chain_sum(size=134, heldout_size=66))


def test_system_prompt_comes_first() -> None:
    prompt = load_task(_chain_sum(system_prompt="Be brief.")).train[0]["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert [message["role"] for message in load_task(_chain_sum()).train[0]["prompt"]] == ["user"]


def test_default_reward_is_the_data_sets_own_scorer() -> None:
    task = load_task(_chain_sum(reward="default"))
    (reward,) = task.reward_functions
    row = task.train[0]
    answer = row["answer"]
    completions = [answer, f"<answer>0</answer> <answer> {answer}\n</answer> .", f"It is {answer}", "none"]
    columns = {key: [row[key]] * 4 for key in ("answer", "prompt_index")}
    scores = reward(prompts=[row["prompt"]] * 4, completions=completions, **columns)
    assert scores[:2] == [1.0, 1.0] and 0 < scores[2] < 1 and scores[3] == 0
    assert reward.__name__ == "chain_sum_score"
    with pytest.raises(KeyError):
        reward(prompts=[row["prompt"]], completions=["1"], answer=["1"], prompt_index=[10_000])


def test_other_data_sets_score_their_own_answers() -> None:
    for name in ("gcd", "letter_counting", "spell_backward"):
        task = load_task(TaskConfig(name=name, size=5, heldout_size=2))
        (reward,) = task.reward_functions
        prompts, indices, answers = ([row[key] for row in task.train] for key in ("prompt", "prompt_index", "answer"))
        scores = reward(prompts=prompts, completions=answers, prompt_index=indices, answer=answers)
        assert scores == [1.0] * 5


def test_describe_is_one_line() -> None:
    line = load_task(_chain_sum()).describe()
    assert "chain_sum(min_terms=2" in line and "20 training prompts, 10 held out" in line
    assert "\n" not in line and "exact" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "chain_sums"}, "no data set 'chain_sums': did you mean .*chain_sum"),
        ({"name": "zzzzzz"}, "no data set 'zzzzzz'"),
        (
            {"arguments": {"max_term": 2}},
            "no argument 'max_term': did you mean 'max_terms'.*valid are min_terms",
        ),
        ({"arguments": {"min_terms": 5, "max_terms": 2}}, "refuses .*max_terms must be >= min_terms"),
        ({"arguments": {"min_terms": "two"}}, "chain_sum refuses min_terms='two'"),
    ],
)
def test_wrong_reasoning_gym_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_task(_chain_sum(**changes))
    assert "\n" not in str(caught.value)


def test_jsonl_takes_text_or_messages_and_drops_repeats(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1, 2, ..."}]
    config = _jsonl(
        tmp_path,
        {"prompt": "What is 1 + 1?", "answer": 2, "level": 1},
        "",
        {"prompt": "What is 1 + 1?", "answer": 2},
        {"prompt": messages, "answer": "3"},
        size=2,
        system_prompt="Be brief.",
    )
    rows = sorted(load_task(config).train, key=lambda row: row["prompt_index"])
    assert [row["answer"] for row in rows] == ["2", "3"]
    assert [[message["content"] for message in row["prompt"]] for row in rows] == [
        ["Be brief.", "What is 1 + 1?"],
        ["Count.", "1, 2, ..."],
    ]
    assert "level" not in rows[0], "further keys are for reward functions of one's own"


def test_jsonl_names_each_bad_line(tmp_path: Path) -> None:
    config = _jsonl(
        tmp_path,
        {"prompt": "a", "answer": "1"},
        "{",
        "[1]",
        {"prompt": "b"},
        {"prompt": "c", "answer": True},
        {"prompt": [{"role": "user"}], "answer": 1},
        {"prompt": " ", "answer": 1},
        {"prompt": "a", "answer": 2},
    )
    with pytest.raises(UserError) as caught:
        load_task(config)
    message = str(caught.value)
    for words in ("line 2: not JSON", "line 3: not a JSON object", "line 4: no 'answer'", "line 5: 'answer'"):
        assert words in message
    assert "line 6: 'prompt' must be" in message and "and 2 more bad lines" in message and "\n" not in message


def test_jsonl_same_prompt_with_another_answer(tmp_path: Path) -> None:
    config = _jsonl(tmp_path, {"prompt": "a", "answer": "1"}, "", {"prompt": "a", "answer": "2"})
    with pytest.raises(UserError, match="line 3: same prompt as line 1 with another answer"):
        load_task(config)


def test_jsonl_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_task(TaskConfig(source="jsonl", path=str(tmp_path / "none.jsonl"), size=1, heldout_size=0))
    with pytest.raises(UserError, match="holds no problems"):
        load_task(_jsonl(tmp_path, ""))
    with pytest.raises(UserError, match="only 1 distinct prompts.*task.size=1"):
        load_task(_jsonl(tmp_path, {"prompt": "a", "answer": "1"}, size=2))
    with pytest.raises(UserError, match="cannot read .*'perhaps' to 'Is it\\?'"):
        load_task(_jsonl(tmp_path, {"prompt": "Is it?", "answer": "perhaps"}))
    for answer in ("perhaps", "NaN"):
        with pytest.raises(UserError, match="last_number cannot read"):
            load_task(_jsonl(tmp_path, {"prompt": "Is it?", "answer": answer}, reward="last_number"))


def test_jsonl_columns_reach_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def by_level(prompts, completions, level, **columns):\n    return [1.0 if a is None else a for a in level]\n"
    )
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": "a", "answer": "1", "level": 7, "prompt_index": 99}, {"prompt": "b", "answer": "1"}]
    task = load_task(_jsonl(tmp_path, *lines, size=2, reward="my_rewards.py:by_level"))
    rows = sorted(task.train, key=lambda row: row["prompt_index"])
    assert [row["level"] for row in rows] == [7, None]
    columns = {key: [row[key] for row in rows] for key in ("level", "answer", "prompt_index")}
    assert task.reward_functions[0](prompts=["a", "b"], completions=["x", "y"], **columns) == [7.0, 1.0]


_GOOD = b'{"prompt": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "half \\ud800", "answer": "1"}', "lone surrogate .ud800"),
        (b'{"prompt": "b", "answer": "1", "note": ["\\udfff"]}', "lone surrogate .udfff"),
        (b'{"\\ud800": 1, "prompt": "b", "answer": "1"}', "lone surrogate"),
        (b'{"prompt": "b", "answer": "1", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}", "nested deeper"),
        (b"[" * 200_000, "nested deeper|not JSON"),
        (b'{"prompt": "b", "answer": "1", "x": ' + b'{"y":' * 40 + b"1" + b"}" * 41, "nested deeper than 32"),
        (b'{"prompt": "b", "answer": NaN}', "NaN is no number"),
        (b'{"prompt": "b", "answer": "1", "x": -Infinity}', "-Infinity is no number"),
        (b'{"prompt": "b", "answer": 1e999}', "1e999 is too large"),
        (b'{"prompt": "b", "answer": "1", "x": 1' + b"0" * 30 + b"}", "does not fit 64 bits"),
        (b'{"prompt": "b", "answer": 1' + b"0" * 6000 + b"}", "4300"),
        (b'{"prompt": "b", "prompt": "c", "answer": "1"}', "'prompt' stands twice"),
        (b'{"prompt": "b", "answer": "1", "x": {"y": 1, "y": 2}}', "'y' stands twice"),
        (b'{"prompt": "b\\u0000", "answer": "1"}', "NUL"),
        (b'{"prompt": "caf\xe9", "answer": "1"}', "not text in UTF-8"),
        (b"\0\0\0", "not JSON"),
    ],
)
def test_lines_that_no_data_set_could_hold_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(_GOOD + line + b"\n")
    with pytest.raises(UserError, match=f"line 2: .*({words})") as caught:
        load_task(TaskConfig(source="jsonl", path=str(path), size=1, heldout_size=0, reward="exact"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    str(caught.value).encode()


def test_task_files_that_are_no_plain_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> None:
        load_task(TaskConfig(source="jsonl", path=str(path), size=1, heldout_size=0, reward="exact"))

    pipe, large = tmp_path / "pipe.jsonl", tmp_path / "large.jsonl"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            load(path)
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load(Path("nul\0byte.jsonl"))
    large.write_bytes(_GOOD + b" " * (json_lines.LONGEST_LINE + 2))
    with pytest.raises(UserError, match="line 2 is longer than 16 MiB"):
        load(large)
    monkeypatch.setattr(json_lines, "LARGEST_FILE", 10)
    with pytest.raises(UserError, match="take a part of it"):
        load(large)
    monkeypatch.undo()
    large.write_text('{"prompt": "a", "answer": 1}', encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        load(large)
    large.write_bytes(b"\xef\xbb\xbf" + _GOOD)
    load(large)
