"""Dumps that look like one that is read and mean something else: each is read as its writer meant it, or refused by its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entropy_experiments.buffers.dumps.read import import_rollouts
from entropy_experiments.buffers.dumps.tokens import tokenize_rows
from rl_training.errors import UserError
from rl_training.sampling import SamplingConfig
from tests.entropy_experiments.buffers.dumps.files_of_trainers import WRITERS, lines
from tests.entropy_experiments.buffers.dumps.test_readers import SEQUENCES, TOKENIZER

SAMPLING = SamplingConfig(1.0, 8, (1,), 0)
ROW = {"prompt_ids": [5, 6, 7], "completion_ids": [9, 8, 1], "advantage": 0.5}
TWO = [ROW, {**ROW, "completion_ids": [9, 1], "advantage": -0.5}]


def ids_of(path: Path, sampling: SamplingConfig = SAMPLING):
    return tokenize_rows(import_rollouts(path), TOKENIZER, sampling)


OTHER_NAMES = {
    "response_mask": ([1, 0, 1], "completion_mask"),
    "loss_mask": ([1, 0, 1], "completion_mask"),
    "labels": ([-100, 8, 1], "completion_mask"),
    "old_log_probs": ([-1.0, -1.0, -1.0], "sampler_logprobs"),
    "rollout_log_probs": ([-1.0, -1.0, -1.0], "sampler_logprobs"),
    "uid": ("a", "group"),
    "score": (1.0, "reward"),
}


@pytest.mark.parametrize("key", OTHER_NAMES)
def test_a_column_that_changes_numbers_is_not_passed_over(key: str, tmp_path: Path) -> None:
    value, meant = OTHER_NAMES[key]
    with pytest.raises(UserError, match=f"line 1: '{key}' is not read here: write it as '{meant}'"):
        import_rollouts(lines(tmp_path / "a.jsonl", [{**ROW, key: value}]))
    given = {"completion_mask": [1, 0, 1], "sampler_logprobs": [-1.0] * 3, "group": "g", "reward": 1.0}[meant]
    assert len(import_rollouts(lines(tmp_path / "b.jsonl", [{**ROW, key: value, meant: given}]))) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{**r, "prompt_ids": [0, 0, 5, 6]} for r in TWO], "prompt_ids of 2 rows begin with the padding token 0"),
        ([TWO[0], {**TWO[1], "prompt_ids": [0, 5]}], "prompt_ids of 1 rows begin with the padding token 0"),
        (
            [{**TWO[0], "completion_ids": [9, 8, 7, 6]}, {**TWO[1], "completion_ids": [9, 8, 0, 0]}],
            "completion_ids of 1 rows end in the padding token 0, and all are 4 long",
        ),
        ([{**r, "completion_ids": [5, 6, 7, *r["completion_ids"]]} for r in TWO], "begin with prompt_ids in every row"),
        ([{**TWO[0], "completion_ids": [9, 1, 1, 1]}, TWO[1]], "line 1: completion_ids goes on with 2 padding tokens"),
        ([{**TWO[0], "completion_ids": [9] * 9}, TWO[1]], "line 1: the policy drew 9 tokens"),
        ([{**TWO[0], "temperature": 0.6}, TWO[1]], "line 1: was drawn at temperature 0.6"),
        ([{**TWO[0], "completion_mask": [-100, 8, 1]}, TWO[1]], "line 1: completion_mask must be a list of true and false"),
        ([{**TWO[0], "completion_mask": [0, 0, 0, 1, 1, 1]}, TWO[1]], "line 1: completion_mask has 6 entries"),
        ([{**TWO[0], "advantage": [0.5, 0.5, 0.5]}, TWO[1]], "line 1: advantage must be a finite number"),
        ([{**TWO[0], "advantage": None}, TWO[1]], "line 1: no advantage, which other rows have"),
        ([{**TWO[0], "advantages": [0.5] * 3}, TWO[1]], "line 1: unknown key 'advantages': did you mean 'advantage'"),
        ([{**TWO[0], "sampler_logprobs": [0.9, 0.1, 0.2]}, TWO[1]], "give their logarithms"),
    ],
)  # fmt: skip
def test_rows_of_another_meaning_are_refused(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        ids_of(lines(tmp_path / "a.jsonl", rows))


def test_what_only_looks_like_padding_is_read(tmp_path: Path) -> None:
    """Of several lengths a policy may draw its padding token; where it begins prompts as their first token, it is one."""
    drawn = [{**TWO[0], "completion_ids": [9, 0, 0]}, TWO[1]]
    assert ids_of(lines(tmp_path / "a.jsonl", drawn)).completion_ids[0] == [9, 0, 0]
    marked = [{**r, "completion_ids": [9, 8, 0, 0], "completion_mask": [1, 1, 0, 0]} for r in TWO]
    assert ids_of(lines(tmp_path / "b.jsonl", marked)).drawn == [[True, True, False, False]] * 2
    first = [{**r, "prompt_ids": [1, 5, 6]} for r in TWO]
    assert ids_of(lines(tmp_path / "c.jsonl", first), SamplingConfig(1.0, 8, (1,), 1)).prompt_ids == [[1, 5, 6]] * 2
    with pytest.raises(UserError, match="begin with the padding token 1"):
        twice = [{**r, "prompt_ids": [1, 1, 5, 6]} for r in TWO]
        ids_of(lines(tmp_path / "d.jsonl", twice), SamplingConfig(1.0, 8, (1,), 1))
    once = [{**TWO[0], "completion_ids": [5, 6, 7, 1]}, TWO[1]]
    assert len(ids_of(lines(tmp_path / "e.jsonl", once)).completion_ids) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(json.dumps(ROW).encode(), mtime=0), "is compressed: unpack it"),
        (json.dumps(TWO).encode(), "first line is not a JSON object; write one JSON object a line"),
        (b"prompt,completion,advantage\na,b,1\n", "first line is not JSON"),
        (json.dumps(ROW).encode("utf-16"), "UTF-16: save it as UTF-8"),
        (b"\n\n", "first line is has no line"),
        (b"\x80\x04}q\x00.", "first line is not text in UTF-8"),
        (json.dumps({"question": "?", "answer": "!"}).encode(), "no dump of rollouts that is known"),
    ],
)
def test_files_that_are_no_lines_of_json_say_so(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        import_rollouts(tmp_path / "x.jsonl")


def test_a_step_that_a_resumed_run_wrote_again_is_refused(tmp_path: Path) -> None:
    path = WRITERS["open_instruct"](tmp_path, 5, SEQUENCES, TOKENIZER)
    assert len(import_rollouts(path)) == 4
    path.write_text(path.read_text() + path.read_text())
    with pytest.raises(UserError, match="line 5: sample 0 of step 5 stands twice: the run was resumed"):
        import_rollouts(path)


def test_a_table_of_trl_with_other_columns(tmp_path: Path) -> None:
    """Rewards that did not judge (null), columns of log_extra, plain prompts, a tool's turn."""
    path = WRITERS["trl"](tmp_path, 5, SEQUENCES, TOKENIZER)
    table = pq.read_table(path)

    def written(**columns: list[Any]) -> Path:
        found = table
        for name, values in columns.items():
            found = found.drop_columns([name]) if name in found.column_names else found
            found = found.append_column(name, pa.array(values))
        pq.write_table(found, path)
        return path

    rows = import_rollouts(written(second_reward=[None, 1.0, 0.5, None], note=["a"] * 4)).rows
    assert [r.reward for r in rows] == [SEQUENCES[0].reward, None, None, SEQUENCES[3].reward]
    assert [r.advantage for r in rows] == [s.advantage for s in SEQUENCES], "the advantage is what counts"
    plain = import_rollouts(written(prompt=["3 + 1 ="] * 4, completion=["4"] * 4)).rows
    assert {r.prompt_form for r in plain} == {"plain"} and plain[0].completion == "4"
    turns = [[{"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"}]] * 4
    with pytest.raises(UserError, match="row 1: completion has 2 messages: tokens of tools and turns"):
        import_rollouts(written(completion=turns))
    called = [[{"role": "assistant", "content": "", "tool_calls": "f"}]] * 4
    with pytest.raises(UserError, match="row 1: completion has a message with 'tool_calls'"):
        import_rollouts(written(completion=called))
    parts = [[{"role": "user", "content": [{"type": "image"}]}]] * 4
    with pytest.raises(UserError, match="row 1: a message of prompt must be text"):
        import_rollouts(written(prompt=parts, completion=["4"] * 4))
    with pytest.raises(UserError, match="row 2: advantage must be a finite number"):
        import_rollouts(written(prompt=["a"] * 4, completion=["4"] * 4, advantage=[0.5, float("nan"), 0.5, 0.5]))
