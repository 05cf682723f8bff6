"""Pickles read as data: no object is built and nothing is imported, whatever the file asks for.

The opcodes are decoded by the standard library's `pickletools`, which executes none. What they do
to a stack is carried out here, for those opcodes that torch writes. A class or function of the file
is a name; only names of the allow-list of the caller may be called, and each call is carried out by
the caller's own plain function, or gives a `Record`: the name with its arguments.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 256 << 20
# Of a pickle's opcodes: 10 to 20 make up a tensor, so that these suffice for a million tensors, and end within a minute.
MOST_OPCODES = 20_000_000
_LARGEST_KEY = 1 << 60


class Damaged(Exception):
    """What is wrong with a file, in a few words; who reads the file says which it is."""


@dataclass(frozen=True)
class Name:
    """A class or a function that the file names, as "module name"."""

    text: str


@dataclass(eq=False)
class Record:
    """An object of the file, as data: the class, what it was made from, and what was then set on
    it.
    """

    kind: str
    arguments: tuple[Any, ...]
    state: Any = None

    def get(self, field: str, default: Any = None) -> Any:
        """A field, from its dict or, where the state is a pair, from its slots."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return next((part[field] for part in parts if isinstance(part, dict) and field in part), default)


Call = Callable[..., Any]
"""What a call of an allowed name gives: a plain function of the arguments, as the file has them."""


def read_pickle(
    data: bytes, allowed: Mapping[str, Call | None], storage: Callable[[tuple[Any, ...]], Any] | None = None
) -> Any:
    """The content of a pickle.

    Args:
        data: The whole pickle.
        allowed: "module name" to the function that stands for it; None for a `Record`.
        storage: What a persistent id stands for; without it such ids are refused.

    Raises:
        Damaged: For a pickle that is cut short, larger than any checkpoint's, or holds anything
            that is not allowed.
    """
    if len(data) > MOST_BYTES:
        raise Damaged(f"its description is of {len(data)} bytes, more than any checkpoint's")
    machine = _Machine(allowed, storage)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count > MOST_OPCODES:
                raise Damaged("its description has more opcodes than any checkpoint's")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except Damaged:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"its description is damaged or cut short ({type(error).__name__})") from error
    raise Damaged("its description is cut short")


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BINSTRING SHORT_BINSTRING".split()
)
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "PUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_IGNORED = frozenset({"PROTO", "FRAME"})
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, allowed: Mapping[str, Call | None], storage: Callable[[tuple[Any, ...]], Any] | None) -> None:
        self._allowed, self._storage = allowed, storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise Damaged("its description does not end as a pickle does")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode. Raises Damaged for one that torch does not write."""
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _GETS:
            stack.append(self._memo[int(argument)])
        elif name in _PUTS:
            self._memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(self._pop(count)))
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name not in _IGNORED:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "SETITEMS":
            pairs = self._to_mark()
            _set_items(stack[-1], pairs)
        elif name == "SETITEM":
            pairs = self._pop(2)
            _set_items(stack[-1], pairs)
        elif name in ("APPENDS", "ADDITEMS"):
            items = self._to_mark()
            _extend(stack[-1], items)
        elif name == "APPEND":
            items = self._pop(1)
            _extend(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(self._name(argument))
        elif name == "STACK_GLOBAL":
            stack.append(self._name(" ".join(map(_text, self._pop(2)))))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._pop(2)
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            if isinstance(stack[-1], Record):
                stack[-1].state = state
        elif name == "BINPERSID" and self._storage is not None:
            (identity,) = self._pop(1)
            if not isinstance(identity, tuple):
                raise Damaged("a tensor of it lies nowhere")
            stack.append(self._storage(identity))
        else:
            raise Damaged(f"its description holds {name}, which torch does not write")

    def _name(self, text: str) -> Name:
        if text not in self._allowed:
            raise Damaged(f"it names {_short(text)}, which is no part of a checkpoint: it would have to be executed")
        return Name(text)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Damaged("it calls what is no function")
        call = self._allowed[function.text]
        return Record(function.text, arguments) if call is None else call(*arguments)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise Damaged("its description is damaged")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        if any(item is _MARK for item in taken):
            raise Damaged("its description is damaged")
        return taken

    def _to_mark(self) -> list[Any]:
        taken = []
        while True:
            item = self._stack.pop()
            if item is _MARK:
                return taken[::-1]
            taken.append(item)


def _set_items(target: Any, pairs: list[Any]) -> None:
    if not isinstance(target, dict) or len(pairs) % 2:
        raise Damaged("its description is damaged")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not _is_key(key):
            raise Damaged("it has a key that no checkpoint has")
        target[key] = value


def _is_key(key: Any) -> bool:
    """Whether hashing it takes no time: tuples of tuples may take for ever, numbers may be chosen
    to collide.
    """
    if isinstance(key, tuple):
        return len(key) <= 8 and all(not isinstance(part, tuple) and _is_key(part) for part in key)
    return isinstance(key, str | Record | Name | None) or (isinstance(key, int) and abs(key) < _LARGEST_KEY)


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise Damaged("its description is damaged")
    target.extend(items)


def _text(part: Any) -> str:
    if not isinstance(part, str):
        raise Damaged("its description is damaged")
    return part


def _short(text: str) -> str:
    return repr(".".join(text.split(" "))[:80])
