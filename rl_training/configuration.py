"""Strict configuration: YAML files, `key=value` overrides, and errors that fit on one line.

Every configuration of this project is a tree of frozen pydantic models. A value of the wrong type
is refused rather than coerced (`"8"` is not 8), an unknown key is refused with the nearest known
key named, and what `dump_config` writes is read back by `load_config` as the same configuration.
YAML is read with version 1.2's notion of a float, so that `3e-4` is a number and not a string, and
a key that stands twice is refused.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rl_training.errors import UserError, first_line
from rl_training.files import read_regular


class StrictModel(BaseModel):
    """A section of a configuration: frozen, keyword-only, no coercion, no unknown keys, no
    infinities.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
    )


Config = TypeVar("Config", bound=StrictModel)

_NUMBER = r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?\Z"
_LARGEST = 16 << 20  # bytes of a file
_FLOAT = re.compile(_NUMBER + r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z")


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows `3e-4` for a float and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                problem = f"key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would otherwise read as a number."""


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration from a YAML file and apply dotted overrides.

    Args:
        cls
            The configuration's class.
        path
            A YAML file; `None` starts from the defaults. An empty file means the defaults too.
        overrides Strings such as `optimizer.learning_rate=1e-4`; the value is YAML, a later
            override wins.

    Raises:
        UserError: for a missing or unreadable file, invalid YAML, an unknown key, a wrong value, a
            malformed override.
    """
    data = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(data, override)
    where = "the configuration" if path is None else str(path)
    return validate_config(cls, data, where=f"{where} with its overrides" if overrides else where)


def validate_config(cls: type[Config], data: Mapping[str, Any], where: str = "the configuration") -> Config:
    """Build `cls` from plain data; every mistake becomes part of one line, which starts with
    `where`.
    """
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        mistakes = dict.fromkeys(_explain(cls, details) for details in error.errors(include_url=False))
        raise UserError(f"{where}: {'; '.join(mistakes)}") from None


def dump_config(config: StrictModel) -> str:
    """Return the whole configuration, defaults included, as YAML that `load_config` reads back
    unchanged.
    """
    data = config.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the YAML file in it")
    if not path.exists():
        raise UserError(f"configuration file {path} does not exist (looked in {Path.cwd()})")
    try:
        text = read_regular(path, _LARGEST, "name a YAML file").decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    data = _parse_yaml(text, where=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected sections of 'key: value' lines, found a {_kind(data)}")
    return data


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}: invalid YAML{line}: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a configuration") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: invalid YAML: {first_line(error)}") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise UserError(f"override {override!r} is not of the form section.key=value, e.g. training.steps=8")
    value = _parse_yaml(text, where=f"override {override!r}")
    if isinstance(value, dict | list) and text.lstrip()[:1] not in ("{", "["):
        value = text.strip()  # "task.system_prompt=Answer: a number" is a sentence, not a mapping
    section = data
    for depth, name in enumerate(names[:-1]):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            above = ".".join(names[: depth + 1])
            raise UserError(f"override {override!r}: {above!r} holds a {_kind(section)}, not a section")
    section[names[-1]] = value


def _explain(cls: type[BaseModel], details: Any) -> str:
    """Put one of pydantic's mistakes in words: where, what, and what was found."""
    path = [str(part) for part in details["loc"]]
    if details["type"] == "extra_forbidden":
        return _explain_unknown_key(cls, path)
    where = ".".join(_drop_union_tags(cls, path))
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{where}: {message}" if where else message
    message = message.replace("Input should be", "should be").replace("Field required", "is missing")
    message = message.replace("a valid tuple", "a list of names")
    if details["type"] == "model_type":
        message = "should be a section of 'key: value' lines"
    found = "" if details["type"] == "missing" else f", found {_shorten(details['input'])}"
    return f"{where} {message}{found}"


def _explain_unknown_key(cls: type[BaseModel], path: list[str]) -> str:
    *parents, key = path
    section = _section(cls, parents)
    place = f" in {'.'.join(parents)}" if parents else ""
    known = list(section.model_fields) if section else []
    near = get_close_matches(key, known, n=1)
    elsewhere = [dotted for dotted in _dotted_keys(cls) if dotted.split(".")[-1] == key]
    suggestion = near or elsewhere[:1]
    hint = f"did you mean {suggestion[0]!r}?" if suggestion else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}{place}: {hint}"


def _section(cls: type[BaseModel], names: Sequence[str]) -> type[BaseModel] | None:
    for name in names:
        field = cls.model_fields.get(name)
        inner = field.annotation if field else None
        options = get_args(inner) if isinstance(inner, UnionType) else (inner,)  # "a section, or null" is a section
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if len(models) != 1:
            return None
        cls = models[0]
    return cls


def _dotted_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name in cls.model_fields:
        yield prefix + name
        if section := _section(cls, [name]):
            yield from _dotted_keys(section, f"{prefix}{name}.")


def _drop_union_tags(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Leave out what pydantic appends to a path to name the member of a union that it tried."""
    for depth in range(1, len(path)):
        if _section(cls, path[:depth]) is None:
            return [part for index, part in enumerate(path) if index < depth or part.isdigit()]
    return path


def _kind(value: Any) -> str:
    names = {dict: "section", list: "list", str: "text", bool: "truth value"}
    return names.get(type(value), type(value).__name__)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
