"""Dumps of each trainer as one table; what is wrong in a file is named by its row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import decoders

from entropy_experiments.buffers.dumps.read import import_rollouts, is_dump
from rl_training.errors import UserError
from tests.entropy_experiments.buffers.dumps.files_of_trainers import WRITERS, Sequence, lines
from tests.tiny_policy import character_tokenizer

TOKENIZER = character_tokenizer()
TOKENIZER.backend_tokenizer.decoder = decoders.Fuse()  # texts without spaces between their characters


def sequence(group: int, reply: str, reward: float, advantage: float) -> Sequence:
    prompt = [{"role": "user", "content": f"{group} + 1 ="}]
    ids = TOKENIZER.apply_chat_template([prompt], add_generation_prompt=True, return_dict=True)["input_ids"][0]
    completion = [*TOKENIZER(reply)["input_ids"], TOKENIZER.eos_token_id]
    logprobs = [-0.5 - 0.25 * k for k in range(len(completion))]
    return Sequence(prompt, ids, completion, reward, advantage, logprobs, group)


SEQUENCES = [
    sequence(3, "4", 1.0, 0.5),
    sequence(3, "5", 0.0, -0.5),
    sequence(8, "99", 0.0, -1.0),
    sequence(8, "9", 2.0, 1.0),
]


@pytest.mark.parametrize("trainer", WRITERS)
def test_a_dump_is_read_back_and_kept_in_our_schema(trainer: str, tmp_path: Path) -> None:
    WRITERS[trainer](tmp_path / "dump", 5, SEQUENCES, TOKENIZER)
    table = (
        import_rollouts(tmp_path / "dump") if trainer != "ours" else import_rollouts(tmp_path / "dump/rollouts.jsonl")
    )
    assert len(table) == 4 and table.steps == [5]
    if trainer in ("verl", "trl"):
        assert [r.completion for r in table.rows] == ["4", "5", "99", "9"]
        assert all(r.prompt_ids is None and r.truncated is None for r in table.rows)
        assert any("no group" in note for note in table.notes)
    else:
        assert [r.prompt_ids for r in table.rows] == [s.prompt_ids for s in SEQUENCES]
        assert [r.completion_ids for r in table.rows] == [s.completion_ids for s in SEQUENCES]
        assert [r.sampler_logprobs for r in table.rows] == [s.logprobs for s in SEQUENCES]
        assert len({r.group for r in table.rows[:2]}) == 1 and len({r.group for r in table.rows}) == 2
    if trainer != "verl":
        assert [r.advantage for r in table.rows] == [s.advantage for s in SEQUENCES]
    assert [r.reward for r in table.rows] == [s.reward for s in SEQUENCES]
    again = import_rollouts(table.write(tmp_path / "kept.parquet"))
    assert [replace(r, place="") for r in again.rows] == [replace(r, place="") for r in table.rows]
    assert again.notes == table.notes and is_dump(tmp_path / "kept.parquet")


@pytest.mark.parametrize("trainer", ["verl", "trl", "prime_rl"])
def test_one_step_of_a_folder(trainer: str, tmp_path: Path) -> None:
    for step in (5, 12):
        WRITERS[trainer](tmp_path, step, SEQUENCES[: 2 if step == 5 else 4], TOKENIZER)
    assert import_rollouts(tmp_path).steps == [5, 12]
    assert len(import_rollouts(tmp_path, 5)) == 2 and len(import_rollouts(tmp_path, 12)) == 4
    with pytest.raises(UserError, match="no rollouts of step 6; it has steps 5 to 12"):
        import_rollouts(tmp_path, 6)


def test_masks_of_several_runs_come_through(tmp_path: Path) -> None:
    base = SEQUENCES[0]
    ids = [*TOKENIZER("abcde")["input_ids"], 1]
    masked = replace(
        base,
        completion_ids=ids,
        logprobs=[-0.1 * (k + 1) for k in range(6)],
        mask=[True, True, False, False, True, True],
    )
    for trainer in ("open_instruct", "prime_rl", "ours"):
        path = WRITERS[trainer](tmp_path / trainer, 1, [masked], TOKENIZER)
        row = import_rollouts(path).rows[0]
        assert row.completion_ids == ids and row.completion_mask == masked.mask, trainer
        assert row.drawn_logprobs == [-0.1 * (k + 1) for k in (0, 1, 4, 5)], trainer


GOOD = {"prompt_ids": [5, 6], "completion_ids": [7, 1], "reward": 1.0, "group": 1}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"completion_ids": [7, "x"]}, "holds 'x', which is no token id"),
        ({"completion_ids": [7, -1]}, "holds -1"),
        ({"completion_ids": [7, 1.5]}, r"holds 1\.5"),
        ({"completion_ids": [True, 1]}, "holds True"),
        ({"completion_ids": [[7], 1]}, r"holds \[7\]"),
        ({"completion_ids": []}, "the policy drew nothing"),
        ({"prompt_ids": []}, "nothing predicts the first token"),
        ({"completion_mask": [1]}, "1 entries, completion_ids 2"),
        ({"completion_mask": [0, 0]}, "false everywhere"),
        ({"completion_mask": [2, 0]}, "list of true and false"),
        ({"sampler_logprobs": [-1.0]}, "1 entries, completion_ids 2"),
        ({"sampler_logprobs": [-1.0, 0.4]}, "a log-probability is at most 0"),
        ({"sampler_logprobs": [-1.0, float("-inf")]}, "probability 0"),
        ({"reward": float("nan")}, "finite number, found nan"),
        ({"reward": "1"}, "finite number"),
        ({"reward": None}, "no reward, which other rows have"),
        ({"prompt_ids": None}, "completion_ids without prompt_ids"),
        ({"compeltion_mask": [1, 1]}, "did you mean 'completion_mask'"),
        ({"group": [1]}, "group must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"step": -1}, "step must be a whole number"),
        ({"truncated": "yes"}, "true or false"),
    ],
)
def test_a_bad_row_is_named(bad: dict, words: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [GOOD, GOOD, {**GOOD, **bad}])
    with pytest.raises(UserError, match=f"line 3: .*{words}"):
        import_rollouts(path)
    try:
        rows = [{key: row.get(key) for key in {**GOOD, **bad}} for row in (GOOD, GOOD, {**GOOD, **bad})]
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, TypeError):
        return  # a table cannot hold it
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="row [13]: "):  # of a misspelt column the first row is the first bad one
        import_rollouts(tmp_path / "x.parquet")


def test_ragged_and_foreign_lines_are_named_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "y.jsonl"
    good = json.dumps(GOOD)
    path.write_text(
        f"{good}\n[1]\n{good[:-9]}\n\n{json.dumps({'input': 'a', 'output': 'b', 'score': 1})}\n{good}\n{good[:20]}"
    )
    with pytest.raises(
        UserError, match=r"line 2: not a JSON object; line 3: not JSON.*line 5: is no row of.*line 7.*cut short"
    ):
        import_rollouts(path)


def test_what_is_no_dump_is_said(tmp_path: Path) -> None:
    path = lines(tmp_path / "z.jsonl", [{"question": "?", "answer": "!"}])
    with pytest.raises(UserError, match="no dump of rollouts that is known"):
        import_rollouts(path)
    assert not is_dump(
        lines(tmp_path / "texts.jsonl", [{"prompt": "a", "completion": "b", "reward": 1, "prompt_index": 3}])
    )
    assert is_dump(lines(tmp_path / "schema.jsonl", [{"prompt": "a", "completion": "b", "advantage": 1}]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no dumps"):
        import_rollouts(tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        import_rollouts(tmp_path / "nowhere.jsonl")
    whole = lines(tmp_path / "w.jsonl", [GOOD] * 50)
    import_rollouts(whole).write(tmp_path / "w.parquet")
    content = (tmp_path / "w.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged"):
        import_rollouts(tmp_path / "cut.parquet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["nodes"][1].update(advantages=[1.0, 2.0]), "differ from token to token"),
        (lambda t: t["nodes"][1].update(logprobs=[-1.0]), "2 drawn tokens and 1 logprobs"),
        (lambda t: t["nodes"][1].update(mask=[True]), "2 token_ids and 1 entries of mask"),
        (lambda t: t["nodes"][1].update(token_ids=[], mask=[], logprobs=[]), "did not record them"),
        (lambda t: t["nodes"][1].update(loss_weights={"rl": [0.0, 1.0]}), "weighs single tokens"),
        (lambda t: t["nodes"][1].update(parent=1), "none before it"),
        (lambda t: t["calls"][0]["sampling"].update(top_p=0.9), "top_p=0.9"),
        (lambda t: t["calls"].append({"sampling": {"temperature": 0.5}}), "several temperatures"),
        (lambda t: t.pop("nodes"), "has no nodes"),
    ],
)
def test_episodes_that_are_no_weighted_sequences_are_refused(change, words: str, tmp_path: Path) -> None:
    path = WRITERS["prime_rl"](tmp_path, 3, SEQUENCES[:2], TOKENIZER)
    episodes = [json.loads(line) for line in path.read_text().splitlines()]
    change(episodes[1]["traces"][0])
    with pytest.raises(UserError, match=f"line 2: .*{words}"):
        import_rollouts(lines(path, episodes))


def test_a_reply_that_branches_share_trains_in_the_first_alone(tmp_path: Path) -> None:
    """prime_rl/orchestrator/trajectories.py, iter_trainable_branches: later branches carry its tokens as context."""
    path = WRITERS["prime_rl"](tmp_path, 3, SEQUENCES[:1], TOKENIZER)
    episode = json.loads(path.read_text())
    trace = episode["traces"][0]
    tool = {"parent": 1, "sampled": False, "token_ids": [40, 41], "mask": [False] * 2, "logprobs": []}
    reply = {"sampled": True, "mask": [True, True], "logprobs": [-0.5, -0.25], "advantages": [0.5, 0.5]}
    trace["nodes"] += [tool, {**reply, "parent": 2, "token_ids": [50, 1]}, {**reply, "parent": 1, "token_ids": [60, 1]}]
    first, second = import_rollouts(lines(path, [episode])).rows
    shared, prompt = SEQUENCES[0].completion_ids, SEQUENCES[0].prompt_ids
    assert first.completion_ids == [*shared, 40, 41, 50, 1]
    assert first.completion_mask == [*[True] * len(shared), False, False, True, True]
    assert second.prompt_ids == [*prompt, *shared] and second.completion_ids == [60, 1]
    assert second.completion_mask is None and second.sampler_logprobs == [-0.5, -0.25]
    trace["nodes"][3].pop("advantages")
    with pytest.raises(UserError, match="some of its replies have advantages and others none"):
        import_rollouts(lines(path, [episode]))


def test_groups_and_sessions_of_the_newest_verl(tmp_path: Path) -> None:
    """verl/trainer/ppo/v1/trainer_base.py: uid is <prompt>_<session>_<output>; two prompts of one text are two groups."""
    rows = [{"input": "1 + 1 =", "output": str(k), "gts": "2", "score": float(k), "step": 3, "uid": f"{u}_{k}_0"}
            for u in ("a-b_c", "d") for k in range(2)]  # fmt: skip
    table = import_rollouts(lines(tmp_path / "3.jsonl", rows))
    assert [r.group for r in table.rows] == ["a-b_c", "a-b_c", "d", "d"] and table.notes == ()
    with pytest.raises(UserError, match="line 5: is output 1 of a session of several"):
        import_rollouts(lines(tmp_path / "3.jsonl", [*rows, {**rows[-1], "uid": "d_1_1"}]))


def test_branches_of_an_episode_and_what_does_not_train(tmp_path: Path) -> None:
    path = WRITERS["prime_rl"](tmp_path, 3, SEQUENCES[:2], TOKENIZER)
    episodes = [json.loads(line) for line in path.read_text().splitlines()]
    trace = episodes[0]["traces"][0]
    other = {**trace["nodes"][1], "parent": 0, "token_ids": [9, 1], "mask": [True, True]}
    trace["nodes"].append(other)
    episodes[1]["traces"].append({**episodes[1]["traces"][0], "agent": {"trainable": False}})
    table = import_rollouts(lines(path, episodes))
    assert [r.completion_ids for r in table.rows] == [SEQUENCES[0].completion_ids, [9, 1], SEQUENCES[1].completion_ids]
    assert any("branches" in note for note in table.notes)


def test_stored_rollouts_of_our_trainer_are_read(tiny_run: Path) -> None:
    table = import_rollouts(tiny_run, 2)
    assert table.steps == [2] and all(r.weight is not None and r.prompt_ids for r in table.rows)
