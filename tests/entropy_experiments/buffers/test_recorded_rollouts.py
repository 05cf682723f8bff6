"""Analyses of runs whose completions hold tokens that the policy did not draw, and of runs that mask cut completions out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.double_sampling import draw_buffers
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.records.record import json_of
from entropy_experiments.report.interactive.sequences import sequence_details
from entropy_experiments.sweep.config import SweepConfig
from entropy_experiments.text.display import PromptFrame
from rl_training.configuration import load_config
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts, write_rollouts
from rl_training.run.sidecar import read_sidecar
from rl_training.train import build_trainer
from tests.entropy_experiments.small_analysis import config
from tests.oracle.environment import drawn_terms
from tests.rl_training.two_turns import FOREIGN, two_turns
from tests.tiny_policy import save_tiny_policy, tiny_train_config

SAMPLING = "entropy_analysis.sampling"
FROM_RUN = (f"{SAMPLING}.train_prompts=from_run", f"{SAMPLING}.eval_prompts=from_run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a policy that talks with an environment, saved after the second and the third."""
    root = tmp_path_factory.mktemp("environment")
    settings = tiny_train_config(
        save_tiny_policy(root / "policy"), root / "run",
        rollouts={"prompts_per_step": 4, "completions_per_prompt": 4, "max_completion_length": 12},
        training={"steps": 3, "save_every": 1}, entropy_probe={"enabled": False},
    )  # fmt: skip
    trainer, _ = build_trainer(settings)
    trainer.rollout_func = two_turns
    trainer.train()
    return root / "run"


@pytest.fixture(scope="module")
def analysis(run: Path, tmp_path_factory: pytest.TempPathFactory):
    more = ("entropy_analysis.analysis.attribution=true", "entropy_analysis.analysis.fresh_scales=[1.0]")
    return run_fisher_analysis(
        run / "checkpoint-2", config(*FROM_RUN, *more), folder=tmp_path_factory.mktemp("r") / "one"
    )


@pytest.mark.long
def test_recorded_buffers_are_analysed_with_foreign_tokens_conditioned_on(run: Path, analysis) -> None:
    assert not analysis.failed_checks
    rows = pq.read_table(analysis.folder / "sequences.parquet").to_pylist()
    model = load_checkpoint(run / "checkpoint-2", device="cpu").model.double()
    recorded = {"training": read_rollouts(run, 2), "evaluation": read_rollouts(run, 3)}
    sums = {"training": np.zeros(2), "evaluation": np.zeros(2)}
    for row in rows:
        assert any(row["completion_ids"] == list(r.completion_ids) for r in recorded[row["buffer"]]), (
            "not what was recorded"
        )
        drawn = row["completion_mask"] or [True] * len(row["completion_ids"])
        with torch.no_grad():
            logprobs, entropies = drawn_terms(model, row["prompt_ids"], row["completion_ids"], drawn)
        assert row["length"] == len(logprobs) and row["score"] == pytest.approx(float(logprobs.sum()), rel=1e-4)
        assert row["entropy_sum"] == pytest.approx(float(entropies.sum()), rel=1e-4)
        assert [x is None for x in row["logprobs"]] == [not d for d in drawn] == [x is None for x in row["entropies"]]
        assert all(own or token in FOREIGN for token, own in zip(row["completion_ids"], drawn, strict=True))
        end = "environment" if not drawn[-1] else "ended" if row["completion_ids"][-1] == 1 else "truncated"
        assert row["ending"] == end and row["truncated"] == (end == "truncated")
        sums[row["buffer"]] += [float(entropies.sum()), len(logprobs)]
    endings = {row["ending"] for row in rows}
    assert "environment" in endings and "truncated" in endings, "the test is blind"
    summary = json_of(analysis.summary)
    value = summary["entropy"]["per_token"]["value"]
    assert value == pytest.approx(sums["evaluation"][0] / sums["evaluation"][1], rel=1e-5)
    training = [row for row in rows if row["buffer"] == "training"]
    shares = [row["delta_h"] for row in training]
    assert sum(shares) == pytest.approx(summary["attribution"]["delta_h_batch"], rel=1e-4) and any(shares)
    for row in training:
        assert sum(x or 0.0 for x in row["token_shares"]) == pytest.approx(
            row["delta_h"], abs=1e-4 * max(map(abs, shares))
        )
        assert [x is None for x in row["token_shares"]] == [x is None for x in row["logprobs"]]
    weights = {r.completion_ids: r.weight for r in recorded["training"] if r.status != "rejected"}
    assert all(row["weight"] == weights[tuple(row["completion_ids"])] for row in training), "the run's own weights"
    prompts = {name: {row["prompt_index"] for row in rows if row["buffer"] == name} for name in sums}
    assert not prompts["training"] & prompts["evaluation"]


def test_shares_and_contributions_by_group(analysis) -> None:
    rows = pq.read_table(analysis.folder / "sequences.parquet").to_pylist()
    groups = json_of(analysis.summary)["analyses"]["attribution"]["groups"]
    assert {(g["side"], g["by"]) for g in groups} == {
        ("training", "ending"), ("training", "advantage"), ("evaluation", "ending"),
    }  # fmt: skip
    for group in groups:
        members = [row for row in rows if row["buffer"] == group["side"]]
        if group["by"] == "ending":
            members = [row for row in members if row["ending"] == group["group"]]
        else:
            signs = {"positive": 1, "negative": -1, "zero": 0}
            members = [row for row in members if np.sign(row["advantage"]) == signs[group["group"]]]
        value = sum(row["delta_h" if group["side"] == "training" else "delta_h_lost"] for row in members)
        assert group["sequences"] == len(members) > 0 and group["value"] == pytest.approx(value, rel=1e-6, abs=1e-12)
        tokens = sum(row["length"] for row in members)
        assert group["entropy"] == pytest.approx(sum(row["entropy_sum"] for row in members) / tokens, rel=1e-6)


def test_the_page_shows_foreign_tokens_as_such(analysis) -> None:
    rows = pq.read_table(analysis.folder / "sequences.parquet").to_pylist()
    training = [row for row in rows if row["buffer"] == "training"]
    details = sequence_details([], training, PromptFrame("", ""))["training"]
    for row, shown in zip(training, details, strict=True):
        drawn = row["completion_mask"] or [True] * len(row["completion_ids"])
        assert shown["tokens"]["foreign"] == [k for k, own in enumerate(drawn) if not own]
        assert any("ended by the environment" in value for _, value in shown["facts"]) == (not drawn[-1])
    tokens = json_of(analysis.summary)["analyses"]["attribution"]["tokens"]["sequences"]
    for entry in tokens:
        drawn = training[entry["sequence"]]["completion_mask"]
        assert entry["drawn"] == drawn and len(entry["tokens"]) == len(training[entry["sequence"]]["completion_ids"])
        assert drawn is None or all(own or value == 0 for own, value in zip(drawn, entry["tokens"], strict=True))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), r"rollout_func.*no evaluation or training buffer.*eval_prompts=from_run"),
        (FROM_RUN[:1], r"rollout_func.*no evaluation buffer"),
        (FROM_RUN[1:], r"rollout_func.*no training buffer.*train_prompts=from_run"),
    ],
)
def test_what_an_environment_wrote_cannot_be_drawn_anew(run: Path, tmp_path, overrides, words: str) -> None:
    sidecar = read_sidecar(run / "checkpoint-2")
    assert sidecar is not None and sidecar.sampling.environment == "rollout_func"
    with pytest.raises(UserError, match=words):
        run_fisher_analysis(run / "checkpoint-2", config(*overrides), folder=tmp_path / "no")


def test_foreign_tokens_of_a_run_that_named_no_environment(run: Path, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoint-2" / "entropy_experiments.json"
    record = json.loads(path.read_text())
    record["sampling"]["environment"] = record["own_sha256"] = None
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="tokens that the policy did not draw"):
        run_fisher_analysis(copy / "checkpoint-2", config(FROM_RUN[0]), folder=tmp_path / "no")


def test_recorded_rows_have_prompts_of_their_own() -> None:
    """A sweep takes them too (test_sweep_from_run); the training buffer's prompts are never theirs."""
    assert (
        load_config(SweepConfig, None, [FROM_RUN[1]]).of_a_checkpoint().entropy_analysis.sampling.eval_prompts
        == "from_run"
    )
    with pytest.raises(UserError, match="takes the sequences that the run recorded"):
        config(FROM_RUN[1], f"{SAMPLING}.same_prompts=true")


def test_the_last_checkpoint_has_no_next_step(run: Path, tmp_path) -> None:
    with pytest.raises(UserError, match=r"step-000004.*earlier checkpoint"):
        run_fisher_analysis(run / "checkpoint-3", config(*FROM_RUN), folder=tmp_path / "no")


def test_evaluation_from_the_run_takes_the_first_round_and_other_prompts(tiny_run: Path, tmp_path) -> None:
    """Of a run without an environment: what step 3 drew at first, whatever became of it, without the training prompts."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    rows = read_rollouts(copy, 3)
    write_rollouts(copy, 3, [*rows, replace(rows[0], round=1, prompt_index=23)])
    checkpoint = load_checkpoint(copy / "checkpoint-2", device="cpu")
    settings = config(*FROM_RUN)
    evaluation, training = draw_buffers(checkpoint, plan_sampling(checkpoint, settings), settings)
    first = [r for r in rows if r.round == 0 and r.prompt_index not in set(training.rollouts.prompt_index)]
    assert sorted(evaluation.completion_ids) == sorted(list(r.completion_ids) for r in first)[: len(evaluation)]
    assert evaluation.drawn == [None] * len(evaluation) and len(evaluation) == len(first)
    small = config(FROM_RUN[1], "entropy_analysis.eval_batch_size=4")
    again, drawn = draw_buffers(checkpoint, plan_sampling(checkpoint, small), small)
    assert len(again) == 4 and len(set(again.prompt_index)) == 4, "distinct prompts first"
    assert not set(again.prompt_index) & set(drawn.rollouts.prompt_index)


def test_segments_of_a_file(tiny_run: Path, tmp_path) -> None:
    lines = [
        {
            "prompt": "1 + 1 =",
            "completion": [{"text": "ab"}, {"text": "XYZ", "drawn": False}, {"text": "c"}],
            "weight": 1.0,
        },
        {"prompt": "2 + 2 =", "completion": [{"text": "q"}, {"text": "RS", "drawn": False}], "weight": -1.0},
        {"prompt": "3 + 3 =", "completion": "plain", "weight": 0.5},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = load_checkpoint(tiny_run, device="cpu")
    settings = config(f"{SAMPLING}.train_sequences_path={path}", f"{SAMPLING}.eval_sequences_path={path}",
                      f"{SAMPLING}.same_prompts=true")  # fmt: skip
    plan = plan_sampling(checkpoint, settings)
    for rollouts in (lambda pair: (pair[0], pair[1].rollouts))(draw_buffers(checkpoint, plan, settings)):
        assert rollouts.drawn == [[True] * 2 + [False] * 3 + [True] * 2, [True, False, False], None]
        assert [len(ids) for ids in rollouts.completion_ids] == [7, 3, 6] and rollouts.lengths == [4, 1, 6]
        assert rollouts.completion_ids[0][-1] == 1 and rollouts.completion_ids[1][-1] != 1, "only drawn ends get an EOS"
        assert rollouts.completion == ["abXYZc", "qRS", "plain"]
        assert rollouts.endings(plan.sampling_config) == ["ended", "environment", "ended"]
    result = run_fisher_analysis(tiny_run, settings, folder=tmp_path / "own")
    assert not result.failed_checks


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ([], "list of"),
        ([{"text": "a", "drawn": "no"}], "true or false"),
        ([{"text": "a", "role": "tool"}], "segment"),
        ([{"text": "a", "drawn": False}, {"text": ""}], "nothing can be scored"),
    ],
)
def test_bad_segments_are_refused_by_their_line(tmp_path, completion, words: str) -> None:
    from entropy_experiments.buffers.custom import read_custom_sequences

    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": completion}) + "\n")
    with pytest.raises(UserError, match=f"line 1.*{words}"):
        read_custom_sequences(path)


def test_cut_completions_have_no_weight_where_the_run_masked_them(tiny_run: Path) -> None:
    """Advantages keep them in their groups' means, as TRL does; N stays."""
    checkpoint = load_checkpoint(tiny_run, device="cpu")
    found = []
    for masked in ("false", "true"):
        settings = config(f"{SAMPLING}.mask_truncated_completions={masked}")
        plan = plan_sampling(checkpoint, settings)
        found.append(draw_buffers(checkpoint, plan, settings)[1])
    plain, masked = found
    cut = np.array([ids[-1] not in (0, 1) for ids in plain.rollouts.completion_ids])
    assert 0 < cut.sum() < len(cut) and bool(plain.weights[torch.from_numpy(cut)].any()), "the test is blind"
    assert torch.equal(plain.advantages, masked.advantages)
    assert torch.equal(masked.weights, plain.weights * torch.from_numpy(~cut))
