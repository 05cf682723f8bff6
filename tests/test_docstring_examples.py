"""Every public name has an example: of entropy_core in its docstring, and run; of the others on its page of docs/api.

The examples of entropy_core share what the first block of docs/api/entropy_core.md makes: the page is run, then each example.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from typing import Any

import pytest

import entropy_core
from rl_training.integrations import dashboards
from tests.documents import ROOT, blocks

NAMES = [name for name in entropy_core.__all__ if callable(getattr(entropy_core, name))]
PAGE = "docs/api/entropy_core.md"


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """What the page's first block makes."""
    block = next(block for block in blocks() if block.page == PAGE and block.language == "python")
    made: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), made)
    return made


def run_examples(named: object, name: str, shared: dict[str, Any]) -> int:
    """How many examples the docstring has; each must print what it says."""
    (test,) = [doctest.DocTestParser().get_doctest(inspect.getdoc(named) or "", dict(shared), name, None, 0)]
    said: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test, out=said.append)
    assert not found.failed, "".join(said)
    return found.attempted


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_entropy_core_run(name: str, shared: dict[str, Any]) -> None:
    assert run_examples(getattr(entropy_core, name), name, shared), f"{name} has no example"


def test_examples_of_dashboards_run() -> None:
    assert run_examples(dashboards.tensorboard_layout, "tensorboard_layout", vars(dashboards))


def documented() -> list[str]:
    """The names on the pages of the API."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+\.\S+)", page.read_text(), flags=re.MULTILINE)]


@pytest.mark.parametrize("name", [name for name in documented() if not name.startswith("entropy_core")])
def test_documented_names_have_an_example_that_fits_them(name: str) -> None:
    """Too long to run here: the example below a name imports it and gives it arguments that it takes. What else is imported is
    resolved by tests/test_documents.py.
    """
    module, _, attribute = name.rpartition(".")
    named = getattr(importlib.import_module(module), attribute)
    page = next(page for page in (ROOT / "docs" / "api").glob("*.md") if f"::: {name}\n" in page.read_text() + "\n")
    below = page.read_text().split(f"::: {name}\n")[1].split("\n:::")[0]
    found = re.search(r"```python\n(.*?)```", below, flags=re.DOTALL)
    assert found, f"{name} has no example on {page.name}"
    tree = ast.parse(found[1])
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert attribute in imported, f"the example of {name} does not import it"
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) == attribute]:
        keywords = dict.fromkeys(keyword.arg for keyword in call.keywords if keyword.arg)
        inspect.signature(named).bind_partial(*[None] * len(call.args), **keywords)


def called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def test_an_example_that_prints_something_else_is_seen(shared: dict[str, Any]) -> None:
    def wrong() -> None:
        """>>> 1 + 1
        3
        """

    with pytest.raises(AssertionError, match="Expected"):
        run_examples(wrong, "wrong", shared)
