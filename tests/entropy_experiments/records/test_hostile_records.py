"""Results files of strangers: whatever stands in a field, one line names the field, the file and the remedy."""

import copy
import json
from pathlib import Path

import pytest

from entropy_experiments.records.history_rows import HistoryRow
from entropy_experiments.records.record import Record, json_of, validated
from entropy_experiments.records.run_record import RunRecord
from entropy_experiments.records.step_results import InterventionResult
from entropy_experiments.records.summary import StepParts
from rl_training.errors import UserError

ESTIMATE = {"value": -0.1, "standard_error": 0.02, "low": -0.14, "high": -0.05, "degrees_of_freedom": 7.0}
PARTS = {"total": ESTIMATE, "batch": ESTIMATE, "momentum": ESTIMATE, "weight_decay": ESTIMATE}


def refusal(kind, content):
    with pytest.raises(UserError) as caught:
        validated(kind, content, Path("folder/summary.json"))
    line = str(caught.value)
    assert line.startswith("folder/summary.json: ") and line.endswith("run `entropy-experiments analyze` again")
    assert "\n" not in line and len(line) < 300
    return line


def nested(depth):
    tree = 0
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    "value",
    [
        "-0.1",
        True,
        float("inf"),
        float("nan"),
        [1.0],
        {"value": 1.0},
        10**400,
        [0.0] * 1_000_000,
        nested(900),
        "x" * 10**6,
    ],
    ids=["text", "bool", "inf", "nan", "list", "object", "huge", "long list", "deep", "long text"],
)
def test_no_junk_is_a_number(value):
    assert "momentum.low" in refusal(StepParts, PARTS | {"momentum": ESTIMATE | {"low": value}})


@pytest.mark.parametrize("value", [1.0, True, "1", None, -1, 2**60, [1]])
def test_a_count_is_a_whole_number_from_0(value):
    assert "step" in refusal(list[HistoryRow], [{"step": value}])


def test_a_whole_number_is_a_number():
    found = validated(StepParts, PARTS | {"total": ESTIMATE | {"value": 1}}, "f")
    assert found.total.value == 1.0 and isinstance(found.total.value, float)


def test_missing_and_unknown_fields_are_named():
    assert "momentum is missing" in refusal(StepParts, {k: v for k, v in PARTS.items() if k != "momentum"})
    assert "batch.spread is no field" in refusal(StepParts, PARTS | {"batch": ESTIMATE | {"spread": 1.0}})
    assert "should be an object" in refusal(StepParts, [])
    line = refusal(StepParts, PARTS | {"\x1b[31m" + "k" * 10**5: 1})
    assert "\x1b" not in line
    assert "standard_error" in refusal(StepParts, PARTS | {"total": ESTIMATE | {"standard_error": -0.1}})


def test_lists_that_belong_together_are_equally_long():
    score = dict.fromkeys(InterventionResult.model_fields["scores"].annotation.__args__[1].model_fields)
    score |= {"predicted": [0.1, 0.2], "reason": ""}
    content = {
        "unit": "nats per token", "by": "sequence", "count": 2, "size": 1.0, "subsets": [[0], [1]], "measured": [0.1, 0.2],
        "clip_ratios": None, "scores": {"split": score}, "headline": "split",
        "full_step": {"measured": 0.1, "predicted": {"split": 0.1}},
        "removals": {"lowering": None, "raising": None, "random": None},
    }  # fmt: skip
    validated(InterventionResult, content, "f")
    assert "measured has 1" in refusal(InterventionResult, content | {"measured": [0.1]})
    assert "has no score" in refusal(InterventionResult, content | {"headline": "other"})


def test_records_are_frozen_and_give_back_what_they_were_read_from():
    content = copy.deepcopy(PARTS)
    del content["batch"]["low"]  # as of an estimate without an interval
    found = validated(StepParts, json.loads(json.dumps(content)), "f")
    assert json_of(found) == content
    with pytest.raises(ValueError, match="frozen"):
        found.total = found.batch


def test_every_field_says_what_it_means():
    def records(kind):
        yield kind
        for below in kind.__subclasses__():
            yield from records(below)

    assert RunRecord in set(records(Record))
    bare = [
        f"{kind.__name__}.{name}"
        for kind in records(Record)
        for name, f in kind.model_fields.items()
        if not f.description
    ]
    assert bare == []
