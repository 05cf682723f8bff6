"""Mean rewards of zeros and ones, and their differences, stay where they can be."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.entropy_experiments.compare.test_compare import point_of
from tests.entropy_experiments.comparison_fixture import build_side


def _with_rewards(folder, solved: set[int]):
    """The results with an evaluation reward of 1 for these prompts, else 0."""
    path = folder / "sequences.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        if row["buffer"] == "evaluation":
            row["reward"] = float(row["prompt_index"] in solved)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return folder


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 2), (31, 32)])
def test_no_end_lies_beyond_zero_or_one(tmp_path, first, second):
    folders = [build_side(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    for folder, count in zip(folders, (first, second), strict=True):
        _with_rewards(folder, set(range(count)))
    row = point_of(*folders).row("reward")
    for number, count in zip(row.numbers, (first, second), strict=True):
        assert number.value == pytest.approx(count / 32)
        assert 0.0 <= number.low <= number.value <= number.high <= 1.0 and number.low < number.high, "a certainty"
    gap = row.differences[1]
    assert gap.value == pytest.approx((second - first) / 32)
    if first == second:
        assert gap.number.low is None and gap.is_nothing
    else:
        assert -1.0 <= gap.number.low <= gap.value <= gap.number.high <= 1.0
