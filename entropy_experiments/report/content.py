"""What a page says, before it is HTML: a first screen, and sections of sentences, figures and tables of finished text.

`analyze`, `sweep` and `compare` each make a `Page`; report.interactive.page renders them all alike. A source names the files and
fields, beside the page, that numbers come from; it is shown where the pointer rests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entropy_experiments.statistics.confidence import Sentence
from entropy_experiments.text.numbers import counted

_DEFAULT_HEIGHT, _LEAD_HEIGHT = 420, 560
"""Pixels of a figure, and of one beside the verdict."""


@dataclass(frozen=True)
class Tile:
    """One of the few numbers at the head of a page. tone: "", "good", "warning" or "bad"."""

    label: str
    value: str
    unit: str = ""
    source: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell with more than its text. sort_by: what a page sorts it by, "" where the number is not known. link: an address.
    look: a class of page.css: "bad", or "text" for what a person or a model wrote.
    """

    text: str
    sort_by: str = ""
    link: str = ""
    look: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under `columns`, (heading, whether it holds numbers); without columns a list of facts, rows of a label and a value.

    noun: what a row is, where a page may sort and search the rows. failed: places of rows that are shown in red.
    """

    caption: str
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[str | Cell]]
    source: str = ""
    noun: str = ""
    failed: frozenset[int] = frozenset()

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, with plain text as cells too."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    @property
    def texts(self) -> list[list[str]]:
        """The rows as text alone."""
        return [[cell.text for cell in row] for row in self.cells]


@dataclass(frozen=True)
class PageFigure:
    """One figure of a page; its element's id is figure-NAME.

    reading: how to read it. alt: what it says in words. plot: plotly's data and layout, see report.interactive.page; None for a
    picture only. file: where the PNG lies, relative to the page.
    """

    name: str
    heading: str
    reading: str
    alt: str
    png: bytes
    plot: Mapping[str, Any] | None = None
    file: str = ""
    source: str = ""

    @property
    def height(self) -> int:
        """Pixels that the figure takes."""
        layout = (self.plot or {}).get("layout") or {}
        return int(layout.get("height", _DEFAULT_HEIGHT))

    @property
    def lowered(self) -> PageFigure:
        """The same, no higher than the sentences beside it."""
        if self.plot is None or self.height <= _LEAD_HEIGHT:
            return self
        layout = {**self.plot.get("layout", {}), "height": _LEAD_HEIGHT}
        return replace(self, plot={**self.plot, "layout": layout})


@dataclass(frozen=True)
class Section:
    """What a page says under one heading, in the order of the fields. It is closed until it is asked for.

    name: its element's id; of a part, section-NAME. within: what it holds, beside the heading. short: what the page's contents
    call it, where not by its title. body: a file of report/templates for what needs elements of its own, which is given `values`.
    parts: sections within it, listed at its head.
    """

    name: str
    title: str
    within: str = ""
    short: str = ""
    text: str = ""
    sentences: Sequence[Sentence] = ()
    body: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[PageFigure] = ()
    tables: Sequence[Table] = ()
    parts: Sequence[Section] = ()

    @property
    def counts(self) -> str:
        """How much it holds: "1 figure, 2 tables"."""
        held = ((len(self.figures), "figure"), (len(self.tables), "table"))
        return ", ".join(counted(number, noun) for number, noun in held if number)


@dataclass(frozen=True)
class NextStep:
    """What to do, and where in the page its reason stands. section: the id of an element."""

    text: str
    section: str
    source: str


@dataclass(frozen=True)
class Page:
    """A whole page: a first screen (about: what it answers; tiles; leading sentences beside a figure; what to do next), sections.

    verdict: sentences; those without `lead` go into a section of their own. new_readers: id of the section for those who see such
    a page for the first time. data: name -> JSON for `scripts`, which are files of report/templates beside the page's own.
    """

    title: str
    heading: str
    about: str
    verdict: Sequence[Sentence]
    tiles: Sequence[Tile]
    lead_figure: PageFigure | None
    sections: Sequence[Section]
    next_steps: Sequence[NextStep] = ()
    new_readers: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    scripts: Sequence[str] = ()

    @property
    def leading(self) -> list[Sentence]:
        """The sentences of the first screen."""
        return [sentence for sentence in self.verdict if sentence.lead]

    @property
    def closed(self) -> list[Section]:
        """All sections, the rest of the verdict first."""
        rest = [sentence for sentence in self.verdict if not sentence.lead]
        warnings = sum(sentence.tone == "warning" for sentence in rest)
        words = counted(len(rest), "more sentence")
        words += f", {warnings} of them {'a warning' if warnings == 1 else 'warnings'}" if warnings else ""
        return [*([Section("rest", "Whole verdict", words, sentences=rest)] if rest else []), *self.sections]

    @property
    def draws(self) -> bool:
        """Whether a script draws anything on it."""
        sections = [*self.sections, *(part for section in self.sections for part in section.parts)]
        figures = [self.lead_figure, *(figure for section in sections for figure in section.figures)]
        return bool(self.data) or any(figure is not None and figure.plot is not None for figure in figures)
