"""Configurations are strict, replayable, and wrong ones are refused in one line that names the remedy."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import rl_training.config
from rl_training.config import TrainConfig
from rl_training.configuration import StrictModel, dump_config, load_config, validate_config
from rl_training.errors import UserError
from rl_training.probe_config import GRADIENT_PRESETS, WATCH_PRESETS

DEMO = Path(rl_training.config.__file__).parent / "cfg" / "testconfig.yaml"


class _Anything(StrictModel):
    value: Any = None


def _load_text(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(TrainConfig, path, overrides)


def test_demo_config_names_every_key_and_is_replayable(tmp_path: Path) -> None:
    config = load_config(TrainConfig, DEMO)
    unset = {
        f"{section}.{key}"
        for section in TrainConfig.model_fields
        for key in set(type(getattr(config, section)).model_fields) - getattr(config, section).model_fields_set
    }
    # A key that stands in the file would override the preset's, so those that presets set are left to them.
    tables = (*WATCH_PRESETS.values(), *GRADIENT_PRESETS.values())
    preset = {f"entropy_probe.{key}" for settings in tables for key in (*settings, "estimator")}
    assert unset <= {"task.path", *preset}, "the demo's configuration should show every key"
    assert config.rollouts.prompts_per_step == config.rollouts.completions_per_prompt == 8
    assert _load_text(tmp_path, dump_config(config)) == config


def test_every_key_of_the_demo_config_has_a_comment_or_speaks_for_itself() -> None:
    lines = [line for line in DEMO.read_text().splitlines() if line.startswith("  ") and "#" not in line]
    plain = {"learning_rate", "weight_decay", "lr_scheduler", "warmup_steps", "arguments", "max_terms"}
    assert {line.split(":")[0].strip() for line in lines} <= plain | {"max_digits"}


def test_every_field_is_documented() -> None:
    for section, field in TrainConfig.model_fields.items():
        assert field.description, section
        for key, inner in field.annotation.model_fields.items():
            assert inner.description and "\n" not in inner.description, f"{section}.{key}"


def test_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert _load_text(tmp_path, "# nothing\n") == TrainConfig() == load_config(TrainConfig)


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    config = _load_text(
        tmp_path,
        "optimizer: {learning_rate: 1.0e-3}\n",
        "optimizer.learning_rate=1e-5",
        "lora.target_modules=[q_proj, v_proj]",
        "task.system_prompt=Answer: a number",
        "task.arguments.max_terms=3",
        "training.report_to=[]",
        "training.steps=2",
        "training.steps=3",
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.task.system_prompt == "Answer: a number"
    assert config.task.arguments == {"max_terms": 3}
    assert config.training.report_to == ()
    assert config.training.steps == 3


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    assert _load_text(tmp_path, "optimizer:\n  learning_rate: 3e-4\n").optimizer.learning_rate == 3e-4


@given(st.recursive(st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False), st.lists))
def test_dump_and_load_are_inverse(value: Any) -> None:
    config = validate_config(_Anything, {"value": value})
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(_Anything, path) == config


def test_strings_that_look_like_numbers_survive(tmp_path: Path) -> None:
    config = validate_config(TrainConfig, {"task": {"system_prompt": "3e-4"}})
    assert _load_text(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "optimizer.lerning_rate=1",
            "unknown key 'lerning_rate' in optimizer: did you mean 'learning_rate'?",
        ),
        ("optimiser.learning_rate=1", "unknown key 'optimiser': did you mean 'optimizer'?"),
        ("temperature=2.0", "unknown key 'temperature': did you mean 'rollouts.temperature'?"),
        ("zzz=2.0", "unknown key 'zzz': known keys: model, lora"),
        ("training.steps=8.0", "training.steps should be a valid integer, found 8.0"),
        ("training.steps='8'", "training.steps should be a valid integer, found '8'"),
        ("training.steps=true", "training.steps should be a valid integer, found True"),
        ("training.steps=0", "training.steps should be greater than 0, found 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate should be a finite number"),
        ("optimizer.warmup_steps=3", "constant_with_warmup"),
        ("rollouts.top_p=0.9", "rollouts.top_p: must be 1, found 0.9"),
        ("rollouts.top_k=50", "rollouts.top_k: must be 0, found 50"),
        ("rollouts.completions_per_prompt=1", "greater than or equal to 2"),
        ("algorithm.name=ppo", "algorithm.name should be 'dr_grpo', found 'ppo'"),
        ("lora=3", "lora should be a section"),
        ("lora.target_modules=[]", "lora.target_modules: names no module"),
        ("training.report_to=wandb", "training.report_to should be a list of names, found 'wandb'"),
        ("task.source=jsonl", "set task.path"),
        ("task.path=a.jsonl", "task.source=jsonl"),
        ("task.arguments={seed: 3}", "set task.seed"),
        ("task.reward=exat", "reward 'exat' is none of default, score_answer, exact, last_number"),
        ("task.size=4", "task.size 4 is less than rollouts.prompts_per_step 8"),
        ("task.heldout_size=0", "held-out"),
        ("training.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("a b=3", "section.key=value"),
        ("task.name=@x", "invalid YAML at line 1"),
        ("training.seed.x=1", "training.seed should be a valid integer"),
    ],
)
def test_wrong_overrides_are_one_clear_line(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, None, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  name: [a\n", "invalid YAML at line"),
        ("model: {}\nmodel: {}\n", "key 'model' stands twice"),
        ("- a\n- b\n", "expected sections of 'key: value' lines, found a list"),
        ("training: {seed: 1, seeds: 2}\n", "unknown key 'seeds' in training: did you mean 'seed'?"),
        ("training: {seed: a, steps: b}\n", "; "),
        ("3: 4\n", "3"),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        _load_text(tmp_path, text)
    message = str(caught.value)
    assert words in message and "config.yaml" in message and "\n" not in message


def test_unreadable_files_are_one_clear_line(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)  # once waited for, and for ever
    cases = {
        tmp_path / "none.yaml": "does not exist",
        tmp_path: "is a folder",
        binary: "UTF-8",
        pipe: "a pipe or a device",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            load_config(TrainConfig, path)
        assert "\n" not in str(caught.value)


def test_override_through_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'training.seed' holds a int, not a section"):
        _load_text(tmp_path, "training: {seed: 3}\n", "training.seed.x=1")


def test_configs_are_frozen_and_keyword_only() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.training = config.training
    with pytest.raises(TypeError):
        TrainConfig("smollm2-135m")


def test_config_modules_import_neither_torch_nor_transformers() -> None:
    code = "import sys, rl_training.config; print({'torch', 'transformers', 'trl', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
