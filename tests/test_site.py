"""The documentation site: every page has its place, every listed API name exists, formulas become MathML."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

from docs import build_site
from docs.site.mathematics import on_page_markdown

ROOT = Path(__file__).resolve().parents[1]


def places(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [place for child in children for place in places(child)]


def test_every_page_has_one_place() -> None:
    found = places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = sorted(str(file) for file in build_site.published() if file.suffix == ".md" and (ROOT / file).is_file())
    assert sorted(found) == pages, "give the page a line under nav in mkdocs.yml"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda page: page.stem)
def test_names_of_the_api_are_there(page: Path) -> None:
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute) if module else importlib.import_module(name)
        assert found.__doc__, name


def test_formulas_become_mathml_and_code_stays() -> None:
    page = "Cost $a_1$ and $5, `$x$`\n\n```\n$y$\n```\n\n$$\n\\frac{1}{2}\n$$\n"
    drawn = on_page_markdown(page)
    assert drawn.count("<math") == 2 and "<mfrac>" in drawn
    assert "`$x$`" in drawn and "```\n$y$\n```" in drawn and "and $5," in drawn
