"""What every stored record has in common: strict, frozen, with a unit in each field's description, refused in one line.

A record is written as the JSON that `json_of` makes and read back by `validated`. Nothing is coerced (text is no number, a truth
value is no count), an unknown field is refused, and numbers are finite: what could not be computed is null. Nothing here loads
torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from rl_training.configuration import StrictModel
from rl_training.errors import UserError

REMEDY = "run `entropy-experiments analyze` again"
UNION_TAGS = frozenset({"result", "skipped", "failed", "known", "unknown"})
"""Names of union members, which pydantic puts into the path of a field."""

Nonnegative = Annotated[float, Field(ge=0)] | None
"""A finite number from 0 (a standard error, a spread); null: not known."""
Probability = Annotated[float, Field(ge=0, le=1)] | None
"""A number from 0 to 1; null: not known."""
Count = Annotated[int, Field(ge=0, le=2**53)]
"""A whole number from 0."""
Index = Annotated[int, Field(ge=-(2**53), le=2**53)]
"""A whole number, such as a prompt's."""
Finite = float
"""A finite number."""
Number = Finite | None
"""A finite number; null: not known."""
T = TypeVar("T")
Rows = Annotated[tuple[T, ...], Field(strict=False)]
"""A list of the file, as a tuple."""


class Record(StrictModel):
    """One object of a results file."""


class NotKnown(Record):
    """Why there is no such number."""

    reason: str
    """Why."""


def kind_of_known(entry: Any) -> str:
    """Which member of a union of a record and `NotKnown` an entry is, for pydantic's Discriminator."""
    unknown = isinstance(entry, NotKnown) or (isinstance(entry, Mapping) and "reason" in entry)
    return "unknown" if unknown else "known"


class Result(Record):
    """What one analysis found."""


def same_length(**lists: Sized | None) -> None:
    """Raises ValueError naming the lists that are not equally long; None is no list."""
    counts = {name: len(values) for name, values in lists.items() if values is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{', '.join(f'{name} has {count}' for name, count in counts.items())} entries: one each is needed"
        )


def json_of(record: Record | Sequence[Record]) -> Any:
    """A record, or a list of them, as plain data for JSON: the fields that were given, under their names in the file."""
    if isinstance(record, Record):
        return record.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return [json_of(one) for one in record]


def validated(kind: type[T], content: object, path: Path | str, remedy: str = REMEDY) -> T:
    """`content`, as JSON gives it, as a record (or a list of records) of `kind`.

    Args:
        kind: A `Record`, or `list[...]` of one.
        content: What `json.loads` returned.
        path: The file it was read from, for the message.
        remedy: What to do about it.

    Returns:
        The record, every number of it finite and in its range.

    Raises:
        UserError: One line that names the file, the first wrong field, what was found there, and the remedy.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explained(error)}: {remedy}") from None


def explained(error: ValidationError) -> str:
    """The first wrong field, what was found there, and how many more there are."""
    mistakes = error.errors(include_url=False)
    more = f" (and {len(mistakes) - 1} more fields)" if len(mistakes) > 1 else ""
    return f"{_explain(mistakes[0])}{more}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 2, 4, 4
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def _explain(details: Mapping[str, Any]) -> str:
    where = _path(details["loc"]) or "the file"
    if details["type"] == "extra_forbidden":
        return f"{where} is no field of this format"
    if details["type"] == "missing":
        return f"{where} is missing"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{where}: {message}"
    message = (
        message.replace("Input should be", "should be")
        .replace("a valid dictionary", "an object")
        .replace("a valid", "a")
    )
    message = message.split(" or instance of ")[0]
    return f"{where} {message}, found {_shortened(details['input'])}"


def _shortened(value: object) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _path(location: tuple[int | str, ...]) -> str:
    """``("analyses", "buffers", "result", "edges", 3)`` -> ``analyses.buffers.edges[3]``; keys of hostile files are cut."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in UNION_TAGS:
            printable = part if part.isprintable() and len(part) <= 60 else _shortened(part)
            text += f".{printable}" if text else printable
    return text
