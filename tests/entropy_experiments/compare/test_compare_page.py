"""The page of a comparison in a real browser: its first screen, on a phone and in the dark, and where its numbers come from."""

import pytest

from entropy_experiments.compare.page import write_comparison
from tests.entropy_experiments.browser_visit import Visit
from tests.entropy_experiments.comparison_fixture import build_side, build_sweep

pytestmark = pytest.mark.long


@pytest.mark.parametrize("kind", ["analyses", "sweeps"])
def test_the_page_in_a_browser(browser, kind, tmp_path):
    if kind == "analyses":
        sides = [build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2, shift=0.05)]
    else:
        sides = [
            build_sweep(tmp_path / name, {4: 0.0, 8: shift}, seed=seed)
            for name, shift, seed in (("a", 0.0, 1), ("b", 0.05, 2))
        ]
    out = tmp_path / "out"
    write_comparison(sides, out)
    for view in ({"viewport": {"width": 390, "height": 800}}, {"color_scheme": "dark"}):
        visit = Visit(browser, out / "comparison.html", opened=False, **view)
        assert "B loses" in visit.first_screen()[0]
        visit.close()
    visit = Visit(browser, out / "comparison.html")
    visit.draw("changes")
    visit.says_where_from(out)
    visit.close()
