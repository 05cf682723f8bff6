"""A model's configuration that is damaged, or a stranger's: one line with its cause, at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from rl_training.errors import UserError
from rl_training.models.load import load_model_and_tokenizer, outline_model, read_tokenizer
from tests.tiny_policy import save_tiny_policy


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "policy")


def _set(policy: Path, **values: Any) -> None:
    path = policy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 1e30},
        {"text_config": {"num_experts": 10**8}},
        {"model_type": "gpt2", "n_layer": 10**8},
    ],
    ids=str,
)
def test_layers_without_end_are_refused_before_any_is_made(policy: Path, monkeypatch, values: dict[str, Any]) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("the configuration was made"))
    _set(policy, **values)
    for load in (outline_model, load_model_and_tokenizer):
        with pytest.raises(UserError, match=r"config\.json has \w+=1e?.*no model has more than 4096"):
            load(str(policy))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention_bias": 0}, "attention_bias"),
        ({"num_attention_heads": 0}, "modulo"),
        ({"hidden_size": -1}, "hidden size"),
        ({"dtype": []}, "cannot be loaded"),
        ({"vocab_size": 98}, r"embed_tokens\.weight' is \(99, 32\) in its files, and config\.json wants \(98, 32\)"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_one_line_with_the_cause(policy: Path, values: dict[str, Any], words: str) -> None:
    _set(policy, **values)
    with pytest.raises(UserError, match=words) as caught:
        outline_model(str(policy))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_no_kind_is_one_line(policy: Path) -> None:
    (policy / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(UserError, match="the tokenizer in .* does not load"):
        read_tokenizer(policy)
