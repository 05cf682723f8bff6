"""Chat templates in the sandbox: rendered as transformers renders them, and ended at limits of time, memory and length."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entropy_experiments.cli import app
from entropy_experiments.entropy_runner import run_fisher_analysis
from rl_training.errors import UserError
from rl_training.prompts import limited_templates as limits
from rl_training.prompts.chat_prompts import PromptRendering, tokenize_prompts
from rl_training.prompts.limited_templates import limited_templates
from rl_training.train import run_training
from tests.tiny_policy import character_tokenizer, save_tiny_policy, tiny_train_config

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1 \u00e9\u4e2d\U0001f600 {{ 'no' }} <eos>"},
    {"role": "assistant", "content": [{"type": "text", "text": "2"}], "tool_calls": None, "thinking": "hm"},
    {"role": "user", "content": "and\n\t2+2 "},
]
TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['content'] }}|{% endfor %}",
    "whole data": "{% for m in messages %}{{ m }}{{ m | tojson }}{% endfor %}{{ tools | tojson(indent=2) if tools else '' }}",
    "blocks": (
        "{%- set ns = namespace(last=-1) %}\n  {% for m in messages %}\n    {%- if m.role == 'system' -%}"
        "<<{{ m.content | trim }}>>{% continue %}{% endif %}\n{% set ns.last = loop.index0 %}"
        "[{{ m.role | upper }}] {{ m.content }}\n    {% endfor %}"
        "{{ ns.last }}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
    ),
    "arguments": (
        "{{ eos_token }}{% if enable_thinking is defined and not enable_thinking %}no{% endif %}{{ depth }}{{ bag }}"
    ),
    "date": "{{ strftime_now('%Y-%m-%d %Z %H') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.tool_calls is defined }}{% endfor %}",
}
ARGUMENTS = {
    "enable_thinking": False, "depth": 1.5, "bag": {"z": [1, None, True], "a": "\ud83d"},
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
}  # fmt: skip


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.5)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain_ask = limits._ask
    monkeypatch.setattr(
        limits, "_ask", lambda server, request, seconds: asked.append(1) or plain_ask(server, request, seconds)
    )
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    marked = (
        {"return_assistant_tokens_mask": True, "return_dict": True} if name == "generation" else {"tokenize": False}
    )
    chats = [CHAT, CHAT[1:2], [{"role": "user", "content": "?"}]]
    plain = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **marked, **ARGUMENTS)
    with limited_templates(), limited_templates():
        limited = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **marked, **ARGUMENTS)
    assert limited == plain and asked == [1]
    ids = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True, **ARGUMENTS)["input_ids"]
        for c in chats
    ]
    assert asked == [1], "outside it is transformers' own again"
    assert tokenize_prompts(tokenizer, [*chats, "a text"], PromptRendering(ARGUMENTS))[:3] == ids and asked == [1, 1]


def test_many_prompts_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    chats = [[{"role": "user", "content": f"{k}+1"}] for k in range(130)]
    expected = [tokenizer(f"{k}+1|")["input_ids"] for k in range(130)]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: tokenize_prompts(tokenizer, chats), range(3)):
            assert found == expected


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
TOO_MUCH = "(it needs more than 1024 MiB of memory|took longer than 10.05 s)"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (ENDLESS, "rendering it took longer than 0.55 s|took longer than 0.55 s"),
        ("{{ 'a' * 10**11 }}", TOO_MUCH),
        (DOUBLING, TOO_MUCH),
        ("{{ 'ab' * 3000000 }}", "it makes 6,000,000 characters of a prompt, more than 4,194,304"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", ".*recursion.*"),
        ("{{ raise_exception('no\nway') }}", "no"),
    ],
)
def test_what_exceeds_a_limit_is_one_line(template: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    good, tokenizer.chat_template = tokenizer.chat_template, template
    with monkeypatch.context() as patch:
        if template == ENDLESS:
            patch.setattr(limits, "SECONDS", 0.5)
        with pytest.raises(UserError, match=f"^the chat template cannot be rendered: ({words})$"):
            tokenize_prompts(tokenizer, [CHAT[1:2]])
    tokenizer.chat_template = good
    assert len(tokenize_prompts(tokenizer, [CHAT[1:2]])) == 1, "the next one is rendered again"


def test_a_template_that_broke_out_of_jinja_would_be_in_the_sandbox() -> None:
    request = {"conversations": [CHAT[1:2]], "chat_template": "{{ 1 }}", "tools": None}
    server = limits._server_of(os.getpid())
    assert server is not None
    answer = limits._ask(server, request, 5.0)
    assert answer["rendered"] == ["1"]
    if "seccomp" in server.layers:
        status = Path(f"/proc/{server._pid}/status").read_text()
        assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status


def test_arguments_that_are_no_plain_data_are_left_to_transformers() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ pair }}"
    assert tokenize_prompts(tokenizer, [CHAT[1:2]], PromptRendering({"pair": (1, 2)})) == [
        tokenizer("(1, 2)")["input_ids"]
    ]


def test_training_from_a_strangers_tokenizer_ends_in_one_line(tmp_path: Path, hurried: None) -> None:
    policy = save_tiny_policy(tmp_path / "policy")
    (policy / "chat_template.jinja").write_text(ENDLESS)
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template cannot be rendered: .*took longer than"):
        run_training(tiny_train_config(policy, tmp_path / "run"), quiet=True)
    assert time.monotonic() - start < 120
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.long
@pytest.mark.parametrize("template", [ENDLESS, "{{ 'a' * 10**11 }}"])
def test_a_checkpoints_template_ends_doctor_and_analyze_in_one_line(
    template: str, tmp_path: Path, hurried: None, trained: Path
) -> None:
    checkpoint = Path(shutil.copytree(trained / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))
    (checkpoint / "chat_template.jinja").write_text(template)
    record = json.loads((checkpoint / "entropy_experiments.json").read_text())
    record["sampling"]["chat_template_sha256"] = None
    record["task"]["reward"], record["own_sha256"] = "default", None
    record["sha256"].pop("chat_template.jinja", None)  # whoever writes a template can write its digest
    (checkpoint / "entropy_experiments.json").write_text(json.dumps(record))
    found = CliRunner().invoke(app, ["doctor", str(checkpoint)])
    assert found.exit_code == 1 and "cannot be analysed as it is" in found.output
    assert "the chat template cannot be rendered: " in found.output
    with pytest.raises(UserError, match="^the chat template cannot be rendered: "):
        run_fisher_analysis(checkpoint, folder=tmp_path / "results")
    assert not list(tmp_path.glob("results*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return run_training(tiny_train_config(save_tiny_policy(folder / "policy"), folder / "run"), quiet=True)
