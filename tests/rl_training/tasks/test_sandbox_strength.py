"""A machine without seccomp or Landlock: one warning that names what is not contained, or a refusal where that is set."""

import logging
import re
from collections.abc import Iterator

import pytest

from rl_training.config import TaskConfig
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from rl_training.prompts import limited_templates
from rl_training.prompts.chat_prompts import tokenize_prompts
from rl_training.tasks.sandbox import client, strength
from rl_training.tasks.task import load_task
from tests.tiny_policy import character_tokenizer

SMALL = {"name": "chain_sum", "size": 2, "heldout_size": 1}


@pytest.fixture
def weak(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Servers say that they have these layers."""
    plain = client.messages.receive

    def receive(*arguments, **options):
        found = plain(*arguments, **options)
        return {"layers": request.param} if "layers" in found else found

    monkeypatch.setattr(client.messages, "receive", receive)
    strength._warn_once.cache_clear()
    limited_templates._server_of.cache_clear()
    yield
    strength._warn_once.cache_clear()
    limited_templates._server_of.cache_clear()


@pytest.mark.parametrize(
    ("weak", "words"),
    [
        ([], "seccomp.*could write files, reach the network, start programs"),
        (["landlock"], "seccomp.*could write files"),
        (["seccomp"], "no Landlock: making a task's problems may read any file"),
    ],
    indirect=["weak"],
)
def test_a_weak_sandbox_is_warned_of_once_and_refused_where_set(
    weak: None, words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load_task(validate_config(TaskConfig, SMALL))
        tokenize_prompts(character_tokenizer(), [[{"role": "user", "content": "1"}]])
    warned = [r.getMessage() for r in caplog.records if "sandbox of this machine" in r.getMessage()]
    assert len(warned) == 1 and "\n" not in warned[0] and "ENTROPY_EXPERIMENTS_SANDBOX=require" in warned[0]
    assert re.search(words, warned[0])
    monkeypatch.setenv(strength.SETTING, "require")
    with pytest.raises(UserError, match=f"{words}.*require refuses that"):
        load_task(validate_config(TaskConfig, SMALL))
    limited_templates._server_of.cache_clear()
    with pytest.raises(UserError, match=words):
        tokenize_prompts(character_tokenizer(), [[{"role": "user", "content": "1"}]])


def test_a_whole_sandbox_is_silent_and_a_misspelt_setting_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert strength.weakness(["landlock", "seccomp"]) is None
    monkeypatch.setenv(strength.SETTING, "required")
    with pytest.raises(UserError, match="ENTROPY_EXPERIMENTS_SANDBOX='required' is no setting: write warn or require"):
        strength.check_layers(["landlock", "seccomp"])


def test_where_no_sandbox_can_be_made(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As under Windows: templates are rendered here with a warning, or not at all where it is required."""

    def none(self: object, modules: object) -> None:
        raise UserError("this operating system cannot make a sandbox")

    monkeypatch.setattr(client._Zygote, "serve", none)
    limited_templates._server_of.cache_clear()
    chats = [[{"role": "user", "content": "1"}]]
    with caplog.at_level(logging.WARNING):
        assert tokenize_prompts(character_tokenizer(), chats) == [character_tokenizer()("1|")["input_ids"]]
        tokenize_prompts(character_tokenizer(), chats)
    assert sum("without limits of time and memory" in r.getMessage() for r in caplog.records) == 1
    monkeypatch.setenv(strength.SETTING, "require")
    limited_templates._server_of.cache_clear()
    with pytest.raises(UserError, match="cannot make a sandbox"):
        tokenize_prompts(character_tokenizer(), chats)
    limited_templates._server_of.cache_clear()
