"""A tokenizer that cannot take a text says so in one line."""

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import tokenize_prompts
from tests.tiny_policy import character_tokenizer


def test_a_pattern_that_takes_for_ever_ends_in_one_line() -> None:
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex("(x+x+)+y"), "isolated")
    for prompt in ("x" * 64, [{"role": "user", "content": "x" * 64}]):
        with pytest.raises(UserError, match=r"the tokenizer gives up on a text .*copy it again"):
            tokenize_prompts(tokenizer, [prompt])
