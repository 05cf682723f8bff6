"""Every field of every configuration with values that it cannot have: refused in one line that names the field."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.sweep.config import SweepConfig
from rl_training.config import TrainConfig
from rl_training.configuration import load_config, validate_config
from tests.faults.cases import EITHER, Case
from tests.faults.texts import PLACES

CONFIGURATIONS = {"train": TrainConfig, "analyze": FisherAnalysisConfig, "sweep": SweepConfig}
# Of no field's type, whatever the field: refused. And values that some fields may have: refused or taken, never a traceback.
_NEVER: dict[str, Any] = {"a set of bytes": b"\xff", "an object": object()}
_PERHAPS: dict[str, Any] = {
    "NaN": float("nan"), "infinity": float("inf"), "minus one": -1, "a huge number": 10**400, "a text of NULs": "\0\0",
    "nothing": None, "half a character": "\ud800",
}  # fmt: skip


def leaves(kind: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field that is no section."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        options = typing.get_args(inner) if isinstance(inner, types.UnionType) else (inner,)
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if len(models) == 1:
            yield from leaves(models[0], (*prefix, name))
        else:
            yield (*prefix, name)


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def cases() -> Iterator[Case]:
    """Several hundred, each in microseconds."""
    for command, kind in CONFIGURATIONS.items():
        for path in leaves(kind):
            where = ".".join(path)
            for what, value in _NEVER.items():
                yield Case(f"configuration of {command}", f"{where}: {what}", _validate(kind, path, value), path[-1])
            for what, value in _PERHAPS.items():
                yield Case(
                    f"configuration of {command}",
                    f"{where}: {what}",
                    _validate(kind, path, value),
                    f"{path[-1]}|warm-up",
                    EITHER,
                )
            typo = (*path[:-1], path[-1] + "x")
            yield Case(f"configuration of {command}", f"{where}: misspelt", _validate(kind, typo, 1), typo[-1])
        for what, text in _TEXTS.items():
            yield Case(
                f"configuration of {command}",
                f"YAML: {what}",
                _load(kind, text),
                "YAML|nested|sections|UTF-8|unknown key",
            )
        for what, make in PLACES.items():
            yield Case(f"configuration of {command}", f"the file: {what}", _place(kind, make), "c.yaml")


def _validate(kind: type[Any], path: tuple[str, ...], value: Any) -> Any:
    return lambda folder: validate_config(kind, nested(path, value))


def _place(kind: type[Any], make: Callable[[Path], Any]) -> Any:
    def act(folder: Path) -> None:
        make(folder / "c.yaml")
        load_config(kind, folder / "c.yaml")

    return act


def _load(kind: type[Any], text: bytes) -> Any:
    def act(folder: Path) -> None:
        (folder / "c.yaml").write_bytes(text)
        load_config(kind, folder / "c.yaml")

    return act


_TEXTS = {
    "a list": b"[1, 2]", "not closed": b"a: [", "a key twice": b"seed: 1\nseed: 2", "a tab": b"a:\n\tb: 1", "NULs": b"\0\0",
    "no UTF-8": b"a: \xff\xfe", "an object": b"!!python/object:os.system {}", "a loop": b"a: &a [*a]",
    "deep": b"[" * 3000, "a number": b"7", "an alias of nothing": b"a: *b",
}  # fmt: skip
