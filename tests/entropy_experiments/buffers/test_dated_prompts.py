"""A chat template that prints the day's date makes other prompts of a task tomorrow: said, with what can be done."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from entropy_experiments.buffers import recorded_sampling
from entropy_experiments.buffers.recorded_sampling import refuse_other_prompts, warn_of_the_date
from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import PromptRendering, prints_the_date, tokenize_prompts
from tests.tiny_policy import character_tokenizer

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}:{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
ROW = {"prompt": [{"role": "user", "content": "1+1="}], "prompt_index": 0}


def checkpoint(template, theirs=None):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    record = SimpleNamespace(sidecar=object(), run_dir=Path("runs"), step=4, path=Path("runs/checkpoint-4"))
    return SimpleNamespace(tokenizer=tokenizer, record=record, theirs=theirs)


def config(**arguments):
    return SimpleNamespace(rendering=PromptRendering(arguments))


def held(monkeypatch, found, **arguments):
    """The check against prompts that the run recorded."""
    monkeypatch.setattr(recorded_sampling, "rollouts_path", lambda *_: Path(__file__))
    sequence = SimpleNamespace(prompt_index=0, prompt_ids=tuple(found.theirs))
    monkeypatch.setattr(recorded_sampling, "read_rollouts", lambda *_: [sequence])
    refuse_other_prompts(found, config(**arguments), SimpleNamespace(train=[ROW], heldout=[]))


def test_the_cause_of_other_prompts_is_told_where_it_is_the_date(monkeypatch):
    yesterday = checkpoint(DATED)
    yesterday.theirs = tokenize_prompts(
        yesterday.tokenizer, [ROW["prompt"]], PromptRendering({"date_string": "1 Jan 2001"})
    )[0]
    with pytest.raises(UserError, match=r"prints the date of the day \(strftime_now\).*date_string.*checkpoint.task"):
        held(monkeypatch, yesterday)
    held(monkeypatch, yesterday, date_string="1 Jan 2001")
    other = checkpoint("{% for m in messages %}{{ m['content'] }}{% endfor %}", yesterday.theirs)
    with pytest.raises(UserError, match="the task or the chat template has changed"):
        held(monkeypatch, other)


def test_prompts_of_todays_date_are_warned_of():
    with pytest.warns(UserWarning, match="prints the date"):
        warn_of_the_date(checkpoint(DATED), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_the_date(checkpoint(DATED), config(date_string="1 Jan 2001"))
        warn_of_the_date(checkpoint("{{ messages[0]['content'] }}"), config())
    assert not prints_the_date(SimpleNamespace(chat_template=None), PromptRendering())
