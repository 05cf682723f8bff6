"""Who lowered entropy most over a run: against bootstraps of the prompts themselves, and intervals of sums over checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from entropy_experiments.analyses.who_was_first import bootstrap_counts
from entropy_experiments.records.leave_one_out import FILE_NAME, SHARE_OF_PROMPT, LeftOut, read_leave_one_out
from entropy_experiments.statistics.jackknife_interval import jackknife_interval
from entropy_experiments.sweep.evolution.evolution import describe_evolution
from entropy_experiments.sweep.evolution.first_over_run import first_over_run
from entropy_experiments.sweep.verdict import run_sentences
from tests.entropy_experiments.planted_run import planted_run

B, U, STEPS = 12, 4, 3


def run(rng: np.random.Generator, gap: float, others: bool = False):
    """(values of (STEPS, B, U) whose means over B are the shares, their sums by training prompt, the tables)."""
    mean = -0.1 * np.ones(U)
    mean[2] -= gap
    values = mean + 0.2 * rng.normal(size=(1, B, U)) + 0.02 * rng.normal(size=(STEPS, B, U))
    tables = []
    for k, one in enumerate(values):
        left_out = (one.sum(0) - one) / (B - 1)
        names = tuple(f"prompt {p + (100 * k if others else 0)}" for p in range(B))
        columns = {f"{SHARE_OF_PROMPT}{u}": torch.from_numpy(left_out[:, u].copy()) for u in range(U)}
        tables.append(LeftOut(names, columns))
    return values, dict(enumerate(values.mean(1).sum(0))), tables


@pytest.mark.parametrize("gap", [0.0, 0.5])
def test_it_is_the_bootstrap_of_the_prompts_and_the_jackknife_of_the_sum(gap: float) -> None:
    values, sums, tables = run(np.random.default_rng(0), gap)
    found = first_over_run(sums, tables)
    draws = np.einsum("rb,kbu->ru", bootstrap_counts(B), values) / B
    wins = np.bincount(draws.argmin(1)[draws.min(1) < 0], minlength=U) / len(draws)
    assert [found[u].first_in for u in range(U)] == pytest.approx(wins.tolist())
    assert (found[2].first_in > 0.9) == (gap > 0), "a planted first is first, and equal ones are not"
    for u in range(U):
        series = sum(table.columns[f"{SHARE_OF_PROMPT}{u}"].numpy() for table in tables)
        ends = jackknife_interval(sums[u], series)
        assert (found[u].low, found[u].high) == (float(ends.low), float(ends.high))


def test_prompts_of_their_own_average_out_and_have_no_joint_interval() -> None:
    """What a prompt adds to every checkpoint alike adds up where it is shared: with others' draws the first is surer."""
    rng = np.random.default_rng(1)
    _, sums, shared = run(rng, 0.06)
    apart = [LeftOut(tuple(f"{k} {p}" for p in t.prompts), t.columns) for k, t in enumerate(shared)]
    one, other = first_over_run(sums, shared), first_over_run(sums, apart)
    first = max(one, key=lambda u: one[u].first_in)
    assert other[first].first_in > one[first].first_in
    assert all(entry.low is None and entry.high is None for entry in other.values())


def test_a_prompt_that_is_not_in_every_step_has_no_share_there_and_unknown_shares_decide_nothing() -> None:
    _, sums, tables = run(np.random.default_rng(2), 0.0)
    some = [LeftOut(t.prompts, {k: v for k, v in t.columns.items() if k != f"{SHARE_OF_PROMPT}0"}) for t in tables[:-1]]
    assert set(first_over_run(sums, [*some, tables[-1]])) == set(range(U))
    assert first_over_run(sums, [*tables[:-1], None]) == {} == first_over_run(sums, [])
    assert first_over_run(sums, [*tables[:-1], LeftOut(tables[0].prompts, {})]) == {}


@pytest.mark.parametrize(("spread", "words"), [(1e-4, "comes first ("), (1.0, "no single prompt comes first")])
def test_the_evolution_and_its_verdict_say_how_surely(tmp_path, spread: float, words: str) -> None:
    """Planted shares, and files of values with each evaluation prompt left out that scatter little or much."""
    rng, folders, sums = np.random.default_rng(3), [], {}
    checkpoints, history = planted_run(5)
    for number, folder in enumerate(checkpoints):
        path = tmp_path / str(number)
        path.mkdir()
        prompts = {row["prompt_index"] for row in folder.training}
        for row in folder.training:
            sums[row["prompt_index"]] = sums.get(row["prompt_index"], 0.0) + row["delta_h"]
        table = {"prompt_index": list(range(B)), "prompt": [f"prompt {p}" for p in range(B)]}
        pq.write_table(
            pa.table(table | {f"{SHARE_OF_PROMPT}{u}": spread * rng.normal(size=B) for u in prompts}), path / FILE_NAME
        )
        folders.append(replace(folder, path=path))
    evolution = describe_evolution(folders, history, permutations=19)
    first = evolution.whole.most_lowering_prompts[0]
    known = first_over_run(sums, [read_leave_one_out(folder.path) for folder in folders])[first.prompt_index]
    assert (first.low, first.high, first.first_in) == (known.low, known.high, known.first_in)
    assert (first.first_in > 0.5) == (spread < 1), "the planted scatter decides"
    said = " ".join(str(sentence) for sentence in run_sentences(evolution))
    assert words in said and f"first in {first.first_in:.0%} of 1000 bootstraps over evaluation prompts" in said
