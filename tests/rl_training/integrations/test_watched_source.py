"""Which prompts a probe draws of, where a user names none."""

from types import SimpleNamespace

from datasets import Dataset, IterableDataset

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.watched_source import watched_source


def prompts_of(train, evaluation=None):
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    trainer = SimpleNamespace(train_dataset=train, eval_dataset=evaluation, accelerator=accelerator)
    found = watched_source(trainer, None, EntropyProbeConfig())
    assert [row["prompt_index"] for row in found.prompts] == list(range(len(found.prompts)))
    return [int(row["prompt"]) for row in found.prompts]


def numbers(count, first=0):
    return Dataset.from_list([{"prompt": str(first + i)} for i in range(count)])


def test_a_sorted_data_set_is_drawn_of_all_over():
    """Its first 1024 rows were taken: of one sorted by difficulty, the easy ones."""
    found = prompts_of(numbers(5000))
    assert len(found) == len(set(found)) == 1024
    assert max(b - a for a, b in zip(found, found[1:], strict=False)) <= 5 and found[0] < 5 and found[-1] >= 4990
    assert prompts_of(numbers(20)) == list(range(20))


def test_all_evaluation_sets_are_drawn_of():
    found = prompts_of(numbers(5), {"easy": numbers(3000, 10_000), "hard": numbers(3000, 20_000)})
    assert [sum(first <= n < first + 3000 for n in found) for first in (0, 10_000, 20_000)] == [0, 512, 512]


def test_of_a_stream_the_first_rows_are_taken():
    stream = IterableDataset.from_generator(lambda: ({"prompt": str(i)} for i in range(10**9)))
    assert prompts_of(stream) == list(range(1024))
