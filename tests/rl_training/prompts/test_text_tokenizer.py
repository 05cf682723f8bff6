"""A tokenizer that cannot take a text says so in one line."""

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from entropy_experiments.buffers.custom import as_sampled
from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import tokenize_prompts
from rl_training.prompts.text_tokenizer import text_tokens
from rl_training.sampling import SamplingConfig
from tests.tiny_policy import character_tokenizer


def test_a_pattern_that_takes_for_ever_ends_in_one_line() -> None:
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex("(x+x+)+y"), "isolated")
    for prompt in ("x" * 64, [{"role": "user", "content": "x" * 64}]):
        with pytest.raises(UserError, match=r"the tokenizer gives up on a text .*copy it again"):
            tokenize_prompts(tokenizer, [prompt])


def test_so_does_a_completion_of_a_file() -> None:
    tokenizer = character_tokenizer()
    config = SamplingConfig(1.0, 100, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    assert as_sampled(tokenizer, "1+1", config)[:3] == text_tokens(tokenizer, "1+1")
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex("(x+x+)+y"), "isolated")
    with pytest.raises(UserError, match="the tokenizer gives up on a text"):
        as_sampled(tokenizer, "x" * 64, config)
