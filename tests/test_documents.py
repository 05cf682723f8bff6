"""Every block of code in README and docs is held against the code: Python compiles and its imports are there, commands and their
options exist, YAML fits a configuration. What needs other software is listed, with what it needs.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator

import pytest
import typer
import yaml
from pydantic import BaseModel

from entropy_experiments.cli import app
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.sweep.config import SweepConfig
from rl_training.config import TrainConfig
from rl_training.configuration import validate_config
from rl_training.errors import UserError
from tests.documents import ROOT, Block, blocks, commands

BLOCKS = blocks()
LANGUAGES = {"", "indented", "bash", "sh", "json", "mermaid", "python", "yaml", "cff"}
OTHER_SOFTWARE = {"unsloth": "a CUDA device and Unsloth"}
OTHER_YAML = {"docs/guides/other-trainers/trl-fsdp.md": "distributed_type"}
"""Page -> a first key of YAML there that is another program's (accelerate's)."""
CONFIGURATIONS = {
    "train": TrainConfig,
    "analyze": FisherAnalysisConfig,
    "price": FisherAnalysisConfig,
    "sweep": SweepConfig,
}
COMMANDS = typer.main.get_command(app).commands


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def command_lines() -> Iterator[tuple[Block, list[str]]]:
    """Every call of the command line in a page, as its words after the program's name."""
    for block in of("", "indented", "bash", "sh"):
        for line in commands(block):
            call = re.search(r"(?:^|\s)(?:entropy-experiments|-m entropy_experiments)\s+(.+)$", line)
            if call and not line.startswith(("pip ", "entropy-experiments contributors")):
                yield block, shlex.split(re.split(r"\s[|>]\s", re.sub(r"[\[\]|…]", " ", _kept(call[1])))[0])


def _kept(words: str) -> str:
    """A call without what its synopsis says of it in brackets, but for options; lists of an override stay."""
    return re.sub(r"(=)\[([^\]]*)\]", r"\1(\2)", words)


def test_every_block_is_of_a_language_that_is_looked_at() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(of("python")) > 20 and len(of("yaml")) > 5 and len(list(command_lines())) > 50


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles_and_its_imports_are_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text, str(block))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = [node.module] if isinstance(node, ast.ImportFrom) else names
        for module in modules:
            if module.split(".")[0] in OTHER_SOFTWARE:
                continue
            assert importlib.util.find_spec(module), f"{block}: there is no module {module}"
            if isinstance(node, ast.ImportFrom):
                found = importlib.import_module(module)
                missing = [name for name in names if name != "*" and not hasattr(found, name)]
                assert not missing, f"{block}: {module} has no {missing}"


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_fits_a_configuration(block: Block) -> None:
    content = yaml.safe_load(block.text)
    if OTHER_YAML.get(block.page, "") in content:
        return
    refusals = []
    for model in dict.fromkeys(CONFIGURATIONS.values()):
        try:
            validate_config(model, content)
            return
        except UserError as refusal:
            refusals.append(str(refusal))
    pytest.fail(f"{block} fits no configuration: {refusals}")


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_can_be_read(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():
            json.loads(line)


def test_commands_and_options_exist() -> None:
    for block, words in command_lines():
        name, *rest = words
        assert name in COMMANDS, f"{block}: there is no command {name}"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        for word in rest:
            if word.startswith("--"):
                assert word.partition("=")[0] in known | {"--help"}, f"{block}: {name} has no option {word}"


def test_overrides_name_settings_that_exist() -> None:
    found = 0
    for block, words in command_lines():
        for word in words[1:]:
            key, sign, _ = word.partition("=")
            if sign and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) and key != "key" and words[0] in CONFIGURATIONS:
                found += 1
                assert has_setting(CONFIGURATIONS[words[0]], key.split(".")), (
                    f"{block}: {words[0]} has no setting {key}"
                )
    assert found > 20


def has_setting(model: type[BaseModel], path: list[str]) -> bool:
    field = model.model_fields.get(path[0])
    if field is None or len(path) == 1:
        return field is not None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) and has_setting(kind, path[1:]) for kind in kinds)


def test_targets_of_make_and_files_exist() -> None:
    makefile, found = (ROOT / "Makefile").read_text(encoding="utf-8"), 0
    for block in of("", "indented", "bash", "sh"):
        for line in commands(block):
            if target := re.match(r"make ([a-z-]+)", line):
                found += 1
                assert re.search(rf"^{target[1]}:", makefile, flags=re.MULTILINE), f"{block}: no target {target[1]}"
            for file in re.findall(
                r"(?<!\S)(?:examples|benchmarks|entropy_experiments|rl_training|docs)/\S+\.\w+", line
            ):
                found += 1
                assert (ROOT / file).exists(), f"{block}: there is no {file}"
    assert found > 15


def _programs_by_path() -> set[tuple[str, str]]:
    """(file that says so, program) of everything that is to be run by its path from the repository's root."""
    told = [*ROOT.glob("*.md"), ROOT / "Makefile", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    told += ROOT.glob("benchmarks/**/*.py")
    named = re.compile(r"(?<![\w/])python ((?:benchmarks|docs|notebooks)/[\w/]+\.py)")
    return {(str(path.relative_to(ROOT)), call) for path in told for call in named.findall(path.read_text())}


def test_a_program_that_is_run_by_its_path_finds_what_it_imports() -> None:
    """The root is on Python's path with `python -m benchmarks.x` alone, or where a program puts it there."""
    calls = _programs_by_path()
    assert len(calls) > 10
    for told, program in sorted(calls):
        text, folder = (ROOT / program).read_text(), program.partition("/")[0]
        imported = re.search(rf"^(from|import) {folder}\b", text, re.MULTILINE)
        module = program[:-3].replace("/", ".")
        assert not imported or "sys.path.insert" in text, f"{told}: no module {folder} there; write python -m {module}"
