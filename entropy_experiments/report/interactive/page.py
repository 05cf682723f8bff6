"""A page as one self-contained HTML file of sections, tables and figures that one can hover, zoom and filter.

A `report.content.Page` is rendered by templates/page.html.j2. A figure's ``plot`` is plotly's own JSON, from a function that is
tested on its data::

    {"data": [...traces...], "layout": {...}}                        one picture
    {"slider": {"label": "Checkpoint", "start": 0},                  one picture a step, chosen by a native slider (keyboard,
     "steps": [{"label": "step 8", "data": [...], "layout": {...}}]}     screen reader); steps share what "layout" beside says

The PNG is in the page too: it is what is seen without JavaScript, in print, and where plotly fails. ``plot=None`` leaves the
PNG alone. ``layout.height`` (pixels) is reserved before the figure is drawn. Figures are drawn when they come near the window,
follow the theme, and take the window's width. ``Page.data`` lands in ``<script type="application/json" id="data-NAME">``, read
in JavaScript by ``report.data("NAME")``.

Colours that differ between the light and the dark page are written as names in a plot's JSON ("$ink", "$soft", "$line",
"$page", "$predicted", "$measured", "$neutral", "$fixed", "$fixed-measured", "$entropy", "$reward", "$diverging" for a colour
scale that is neutral at its middle): the page puts the theme's colour in their place. Text in a plot goes through
``plot_text``, because plotly reads some HTML in it; arrays through ``numbers``, because JSON has no NaN.

A table of a section's body becomes sortable, searchable and filterable by attributes alone, see templates/tables.js::

    <table data-table data-search="Search prompts">
    <th data-sort="number" data-filter="Prompt">  <td data-value="-0.5">−0.500</td>

What keeps the page safe: a Content-Security-Policy that names the hash of every script and allows no network; everything a
model or a file contributed is escaped (templates) or set as textContent (scripts); JSON is written so that it cannot close
its element. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from entropy_experiments.report.content import Page
from entropy_experiments.text.display import clip, one_line

_TEMPLATES = Path(__file__).parents[1] / "templates"
_MOST_CHARACTERS = 4000
# Escapes that JSON knows and that no HTML parser reads as the end of a script or the start of a comment.
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def json_for_script(value: Any) -> Markup:
    """``value`` as JSON inside a script element: ASCII, without <, > and &, so that no text in it can end the element.

    Raises ValueError for NaN and infinities, TypeError for what JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def plot_text(text: str, limit: int = 160) -> str:
    """``text`` on one line for a plotly label: legible (``text_display``), cut, and with plotly's HTML switched off."""
    return escape(one_line(text, limit), quote=False)


def numbers(values: Any) -> list[float | None]:
    """A (n,) array for JSON, what is not finite as None; six significant digits, which no screen shows."""
    array = np.asarray(values, dtype=np.float64)
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in array.tolist()]


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # takes a moment, and other commands do not need it

    return get_plotlyjs()


@cache
def _file(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _script(text: str, name: str) -> tuple[Markup, str]:
    """(the script as it stands in the page, its source expression for the Content-Security-Policy)."""
    lowered = text.lower()
    if "</script" in lowered or "<!--" in lowered:
        raise ValueError(f"{name} would close its own script element")
    # An HTML parser reads CR LF as LF, and hashes are taken after that.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Markup(text), f"'sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def _visible_value(value: object) -> object:
    """Last line of defence, for every value a template prints: no control characters, no endless text."""
    return clip(value, _MOST_CHARACTERS) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data_address(png: bytes) -> Markup:
    """The PNG as a data: address; base64 needs no escaping and must not be cut."""
    return Markup("data:image/png;base64," + b64encode(png).decode("ascii"))


def render_page(page: Page) -> str:
    """The finished page.

    Raises:
        ValueError: There is a NaN in the page's data or in a plot.
        jinja2.UndefinedError: A section's body needs more than the section's values.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_address": _data_address, "script_json": json_for_script}
    names = [*(["plotly"] if page.draws else []), "page.js", "figures.js", "tables.js", *page.scripts]
    early, early_hash = _script(_file("theme.js"), "theme.js")
    late = [_script(_plotly() if name == "plotly" else _file(name), name) for name in names]
    sources = " ".join([early_hash, *(source for _, source in late)])
    policy = (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html.j2").render(
        page=page,
        policy=Markup(policy),
        style=Markup("\n".join(_file(name) for name in ("page.css", "figures.css"))),
        early_script=early,
        late_scripts=[text for text, _ in late],
    )
