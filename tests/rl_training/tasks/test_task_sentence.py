"""A task in the words of a model card: for readers of a hub, who know neither our fields nor our folders."""

from __future__ import annotations

from datasets import Dataset

from rl_training.config import TaskConfig
from rl_training.tasks.task_sentence import scripted_task_in_words, task_in_words

GYM = "[reasoning-gym](https://github.com/open-thought/reasoning-gym)"


def words(**fields: object) -> str:
    return task_in_words(TaskConfig(**fields).model_dump(mode="json"))


def test_reasoning_gym() -> None:
    assert words() == (
        f"problems that {GYM} generates as `chain_sum`, 128 to train on and 64 held out; "
        "reward: the data set's own score of the completion, 0 to 1"
    )
    said = words(name="gcd", arguments={"max_value": 9}, system_prompt="Be brief.", reward="last_number", size=8)
    assert said == (
        f"problems that {GYM} generates as `gcd` (`max_value=9`), 8 to train on and 64 held out, after the system prompt "
        "`Be brief.`; reward: 1 if the last number in the completion is the answer, else 0"
    )


def test_a_file_by_its_name_alone() -> None:
    said = words(source="jsonl", path="/home/me/secret/problems.jsonl")
    assert said == (
        "problems of the file `problems.jsonl`, 128 to train on and 64 held out; reward: 1 if math-verify finds it equal to "
        "the answer, else 0"
    )


def test_a_reward_of_ones_own() -> None:
    assert words(reward="/home/me/rewards.py:brevity").endswith("; reward: the function `brevity` of `rewards.py`")
    assert words(reward="my.rewards:brevity").endswith("; reward: the function `brevity` of `my.rewards`")


def test_a_system_prompt_is_no_markdown() -> None:
    """<answer> vanished as a tag, a bar ended the table's cell, a line break the table."""
    said = words(system_prompt="Think.\n\nThen <answer>x | y</answer>, no `code`." + 300 * "z")
    assert "`` Think. Then <answer>x \\| y</answer>, no `code`.zz" in said and "zz… ``; reward" in said
    assert "\n" not in said and len(said) < 500


def test_another_mapping_is_listed() -> None:
    assert task_in_words({"benchmark": "a|b", "size": 3}) == "benchmark `a\\|b`"


def test_a_scripts_data_set() -> None:
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    assert scripted_task_in_words(rows, ["brevity"]) == "2 prompts given by the training script; reward: `brevity`"
    rows.info.dataset_name = "tldr"
    assert scripted_task_in_words(rows, ["f", "g"]) == "2 prompts of the data set `tldr`; rewards: `f`, `g`"
    assert scripted_task_in_words(iter(()), ["f"]).startswith("prompts given by the training script")
