"""Numbers as people read them: signs kept, as many digits as the standard error supports, gaps
named.

Everything here accepts what a JSON file may hold where a number was expected (``None``, text, a
nested object) and answers with "not known" instead of failing, so that one missing value never
hides the rest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOT_KNOWN = "not known"
_MINUS = "\N{MINUS SIGN}"


def as_number(value: object) -> float | None:
    """The finite number in ``value``, or None: booleans, text, NaN and infinities are not
    measurements.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def value_and_error(entry: object) -> tuple[float | None, float | None]:
    """(value, standard error) of ``{"value": …, "standard_error": …}`` or of a bare number.

    A negative standard error is no standard error: None.
    """
    if not isinstance(entry, Mapping):
        return as_number(entry), None
    error = as_number(entry.get("standard_error"))
    return as_number(entry.get("value")), error if error is not None and error >= 0 else None


def series(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Column ``key`` of ``rows`` as float64 (len(rows),), NaN where it is missing or not a number."""
    numbers = [as_number(row.get(key)) for row in rows]
    return np.array([math.nan if number is None else number for number in numbers], dtype=np.float64)


def _decimals_for(scale: float, significant: int) -> int:
    """Decimals that show ``significant`` digits of ``scale``."""
    return max(0, significant - 1 - math.floor(math.log10(abs(scale)))) if scale else significant


def _format(number: float, decimals: int, plus: bool) -> str:
    if decimals > 7 or abs(number) >= 1e9:
        mantissa, exponent = f"{number:+.2e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{number:+.{decimals}f}"
    if float(text.split("e")[0]) == 0:
        text = text[1:]
    elif text.startswith("+") and not plus:
        text = text[1:]
    return text.replace("-", _MINUS)


def signed(value: object, significant: int = 3) -> str:
    """``value`` with its sign and ``significant`` digits: ``+0.0123``, ``−4.56``, ``0``."""
    number = as_number(value)
    if number is None:
        return NOT_KNOWN
    return "0" if number == 0 else _format(number, _decimals_for(number, significant), plus=True)


def plain(value: object, significant: int = 3) -> str:
    """``value`` without a plus sign and without trailing zeros; whole numbers are written whole:
    ``0.21``, ``1e−5``.
    """
    number = as_number(value)
    if number is None:
        return NOT_KNOWN
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}".replace("-", _MINUS)
    if 1e-4 <= abs(number) < 1e-3:
        return _format(number, _decimals_for(number, significant), plus=False).rstrip("0")
    mantissa, _, exponent = f"{number:.{significant}g}".partition("e")
    if exponent and int(exponent) > 0:
        return _format(number, 0, plus=False)
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", _MINUS)


def plus_minus(value: object, error: object, plus: bool = True) -> str:
    """``value ± error``, both cut after the second significant digit of the error."""
    number, spread = as_number(value), as_number(error)
    if number is None:
        return NOT_KNOWN
    if spread is None:
        return f"{signed(number) if plus else plain(number)} (no standard error)"
    if spread == 0:
        return f"{signed(number) if plus else plain(number)} ± 0"
    decimals = _decimals_for(spread, 2)
    return f"{_format(number, decimals, plus)} ± {_format(spread, decimals, False)}"


def with_interval(value: object, low: object, high: object, plus: bool = True) -> str:
    """``value [low, high]``, all cut after the second significant digit of half the interval's
    width.
    """
    number, start, end = as_number(value), as_number(low), as_number(high)
    if number is None:
        return NOT_KNOWN
    if start is None or end is None:
        return f"{signed(number) if plus else plain(number)} (no interval)"
    reach = (end - start) / 2
    if not reach > 0:
        return f"{signed(number) if plus else plain(number)} (exact)"
    decimals = _decimals_for(reach, 2)
    ends = ", ".join(_end(one, decimals, plus) for one in (start, end))
    return f"{_format(number, decimals, plus)} [{ends}]"


def _end(number: float, decimals: int, plus: bool) -> str:
    """An end of an interval; one that would be rounded to 0 keeps a digit, so that its sign is seen."""
    text = _format(number, decimals, plus)
    return text if number == 0 or float(text.replace(_MINUS, "-")) else _format(number, _decimals_for(number, 1), plus)


def counted(count: int, noun: str) -> str:
    """``1 step``, ``3 steps``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
