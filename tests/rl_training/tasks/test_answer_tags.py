"""The content of the last <answer>...</answer>: as a pattern would find it, in one walk through the text."""

import random
import re
import time

from rl_training.tasks.rewards import tagged_answer


def test_it_is_what_the_pattern_finds_last():
    generator = random.Random(0)
    pieces = ["<answer>", "</answer>", "a", "\n", "<answer", "answer>", "</"]
    tagged = 0
    for _ in range(3000):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 9)))
        found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        tagged += bool(found)
        assert tagged_answer(text) == (found[-1] if found else text), text
    assert tagged > 300


def test_tags_that_are_never_closed_are_not_searched_again_and_again():
    """The pattern takes the square of their number, half a minute here; one walk takes a few milliseconds."""
    text = "<answer>" * 60_000
    begun = time.process_time()
    assert tagged_answer(text) == text
    assert time.process_time() - begun < 5.0
