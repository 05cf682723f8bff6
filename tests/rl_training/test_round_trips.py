"""What is written is what is read: configurations, sequences, a run's rollouts, an analysis' records."""

from __future__ import annotations

import json
import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.records.summary import Summary
from entropy_experiments.sweep.config import SweepConfig
from rl_training.config import TrainConfig
from rl_training.configuration import dump_config, load_config
from rl_training.run.rollouts import read_rollouts, write_rollouts
from rl_training.sequences import RolloutSequence
from tests.entropy_experiments.whole_summary import whole_summary
from tests.faults.configurations import leaves

CONFIGURATIONS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "analyze": FisherAnalysisConfig,
    "sweep": SweepConfig,
}
VALUES = st.one_of(
    st.booleans(), st.integers(0, 4096), st.floats(0, 1), st.none(),
    st.sampled_from(("auto", "x", "0.5", "1e-3", "2GB", "null", "no")),
    st.text(max_size=8), st.lists(st.floats(0.01, 1), max_size=3), st.lists(st.text(max_size=3), max_size=2),
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("kind", CONFIGURATIONS)
@settings(max_examples=150)
@given(data=st.data())
def test_a_configuration(kind: str, data: st.DataObject) -> None:
    model, paths = CONFIGURATIONS[kind], list(leaves(CONFIGURATIONS[kind]))
    values: dict[str, Any] = {}
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=4, unique=True)):
        whole = {**values}
        inside = whole
        for name in path[:-1]:
            inside[name] = dict(inside.get(name, {}))
            inside = inside[name]
        inside[path[-1]] = data.draw(VALUES)
        try:
            model.model_validate(whole)
        except (ValidationError, OverflowError):
            continue  # not a value of this field
        values = whole
    try:
        written = model.model_validate(values)
    except ValidationError:  # some have no default
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(dump_config(written), encoding="utf-8")
        assert load_config(model, path) == written


tokens = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple)
numbers = st.floats(-1e4, 1e4)
sequences = st.builds(
    RolloutSequence, prompt_ids=tokens, completion_ids=tokens, advantage=numbers, weight=numbers,
    drawn_score=st.none() | st.floats(-1e4, 0), draw_probability=st.floats(1e-6, 1),
    prompt_index=st.integers(0, 10**6),
    prompt=st.text(max_size=9), completion=st.text(max_size=9), reward=st.none() | numbers,
    status=st.sampled_from(("", "trained", "filler", "rejected")), step=st.just(3), round=st.integers(0, 5),
    rank=st.integers(0, 5),
)  # fmt: skip


def same(one: RolloutSequence, other: RolloutSequence) -> bool:
    return one.to_json() == other.to_json()


@given(sequences)
def test_a_sequence(sequence: RolloutSequence) -> None:
    assert same(RolloutSequence.from_json(json.loads(json.dumps(sequence.to_json()))), sequence)


@settings(max_examples=40)
@given(st.lists(sequences, min_size=1, max_size=4))
def test_a_runs_rollouts(written: list[RolloutSequence]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_rollouts(Path(folder), 3, written)
        found = read_rollouts(Path(folder), 3)
    keys = ("prompt_ids", "completion_ids", "reward", "status", "round", "rank", "prompt_index")
    for one, other in zip(found, written, strict=True):
        assert all(getattr(one, key) == getattr(other, key) for key in keys)
        for key in ("advantage", "weight"):
            a, b = getattr(one, key), getattr(other, key)
            assert a == b or (math.isnan(a) and math.isnan(b))


@cache
def _summary() -> str:
    return Summary.model_validate(whole_summary()).model_dump_json()


@settings(max_examples=40)
@given(factor=st.floats(0.5, 2.0), places=st.sets(st.integers(0, 400), max_size=30))
def test_the_record_of_an_analysis(factor: float, places: set[int]) -> None:
    """Some of its numbers changed, where the record still agrees with itself."""
    count = -1

    def changed(value: Any) -> Any:
        nonlocal count
        if isinstance(value, dict):
            return {key: changed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [changed(inner) for inner in value]
        count += isinstance(value, float)
        return value * factor if isinstance(value, float) and count in places else value

    try:
        record = Summary.model_validate(changed(json.loads(_summary())))
    except ValidationError:
        record = Summary.model_validate_json(_summary())
    assert Summary.model_validate_json(record.model_dump_json()) == record
    assert Summary.model_validate(json.loads(json.dumps(record.model_dump(mode="json")))) == record
