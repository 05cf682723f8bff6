"""`audit` on runs of every make: reuse, accumulation, windows of steps, masks, tools, precision, this project's trainer."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from entropy_experiments.audit.audit import audit_recorded, audit_run
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import read_run
from entropy_experiments.audit.verdicts import AGREES, DIFFERS, RECOMPUTED
from rl_training.integrations.step_recorder import record_steps
from rl_training.models.load import load_model_and_tokenizer
from rl_training.run.step_record import GENERATED, read_step, write_step
from rl_training.train import run_training
from tests.entropy_experiments.audit.conftest import SETTINGS
from tests.entropy_experiments.audit.planted_log import statistics, train_recorded
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.rl_training.two_turns import two_turns
from tests.tiny_policy import even_start_reward, tiny_train_config

pytestmark = pytest.mark.long


def changed(run, change):
    """`run` with another log: change(row) -> new values."""
    return replace(run, log=[{**row, **change(row)} if "entropy" in row else row for row in run.log])


def statuses(audit):
    return {f.status for f in audit.findings if f.status != RECOMPUTED}


def of(audit, metric):
    return [f for f in audit.findings if f.metric == metric]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"mask_truncated_completions": True, "lora": False},
        {"bf16": True, "max_steps": 3},
    ],
    ids=lambda s: next(iter(s)),
)
def test_a_right_log_agrees(audited_policy, tmp_path, settings) -> None:
    """And of a run that reuses completions, a log that looked through the policy that drew them is told from that."""
    planted = train_recorded(make_trainer(audited_policy, tmp_path / "run", **{**SETTINGS, **settings}))
    run = read_run(planted.run)
    policies = Policies(run, "cpu")
    audit = audit_recorded(run, policies)
    assert statuses(audit) == {AGREES} and not audit.unaudited and len(of(audit, "entropy")) == planted.steps
    assert max(abs(f.difference) for f in of(audit, "entropy")) < (5e-4 if "bf16" in settings else 3e-6)
    if settings.get("mask_truncated_completions"):
        # A trainer that forgot its own mask: everything generated is in the mean.
        found = audit_recorded(changed(run, lambda row: {"entropy": planted.unmasked(row["step"])}), policies)
        assert all(f.status == DIFFERS and "all generated sequences" in f.why for f in of(found, "entropy"))
    if "num_iterations" in settings:
        # Step 2 trains on what the policy before step 1 drew: a log of that policy's entropy is the policy's one step earlier.
        logs = {2: planted.mean("stale", 2, 2), 4: planted.mean("stale", 4, 4)}
        found = audit_recorded(changed(run, lambda row: {"entropy": logs.get(row["step"], row["entropy"])}), policies)
        wrong = [f for f in of(found, "entropy") if f.status != AGREES]
        assert [f.step for f in wrong] == [2, 4]
        assert all("one step earlier" in f.why and "the policy that generated" in f.why for f in wrong)


def test_rows_that_average_steps(audited_policy, tmp_path) -> None:
    settings = {**SETTINGS, "logging_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    planted = train_recorded(make_trainer(audited_policy, tmp_path / "run", **settings))
    run = read_run(planted.run)
    policies = Policies(run, "cpu")
    audit = audit_recorded(run, policies)
    assert statuses(audit) == {AGREES} and [(f.first_step, f.step) for f in of(audit, "entropy")] == [(1, 2), (3, 4)]
    assert of(audit, "entropy")[0].recomputed == pytest.approx(planted.mean("right", 1, 2), abs=3e-6)
    found = audit_recorded(changed(run, lambda r: {"entropy": planted.mean("right", r["step"], r["step"])}), policies)
    assert all(
        f.status == DIFFERS and "of the last step since the last log alone" in f.why for f in of(found, "entropy")
    )
    found = audit_recorded(
        changed(run, lambda r: {"entropy": planted.mean("surprisal", r["step"] - 1, r["step"])}), policies
    )
    assert all(f.status == DIFFERS and f.why.startswith("surprisal") for f in of(found, "entropy"))
    # Only some of a row's policies are there: the row is not audited, and says what it needs.
    shutil.rmtree(planted.run / "checkpoint-2")
    audit = audit_run(planted.run, "cpu")
    assert [f.step for f in of(audit, "entropy")] == [2] and statuses(audit) == {AGREES}
    assert len(audit.unaudited) == 1
    for part in ("step 4", "averages steps 3 to 4", "checkpoint-2", "save_steps=1"):
        assert part in audit.unaudited[0]


def test_tokens_of_tools(audited_policy, tmp_path) -> None:
    """Foreign tokens stand in completions and are in no mean; a log that counts them is found."""
    trainer = tools_trainer(audited_policy, tmp_path / "run")
    planted = train_recorded(trainer)
    run = read_run(planted.run)
    policies = Policies(run, "cpu")
    assert any(not all(s.mask) for batch in run.record(1).micro_batches for s in batch), (
        "no tool spoke: the test is blind"
    )
    audit = audit_recorded(run, policies)
    assert statuses(audit) == {AGREES} and not audit.unaudited
    found = audit_recorded(changed(run, lambda r: {"entropy": planted.mean("foreign", r["step"], r["step"])}), policies)
    assert {(f.status, "tools, an environment" in f.why) for f in of(found, "entropy")} == {(DIFFERS, True)}

    def whole_length(row):
        rows = [r for r in read_step(planted.run, row["step"]) or [] if r["part"] == GENERATED]
        return {"completions/mean_length": float(np.mean([len(r["completion_ids"]) for r in rows]))}

    found = audit_recorded(changed(run, whole_length), policies)
    assert {(f.status, "tools, an environment" in f.why) for f in of(found, "completions/mean_length")} == {
        (DIFFERS, True)
    }


def tools_trainer(policy, folder):
    model, tokenizer = load_model_and_tokenizer(str(policy), device="cpu")
    arguments = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=3, logging_steps=1, save_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4, max_completion_length=16,
        gradient_checkpointing=False, report_to=[], disable_tqdm=True, temperature=0.7,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)])
    return GRPOTrainer(
        model.requires_grad_(True), even_start_reward, args=arguments, train_dataset=prompts,
        processing_class=tokenizer, rollout_func=two_turns,
    )  # fmt: skip


# ---------------------------------------------------------------------- the sampler
def test_a_sampler_with_another_distribution(audited_policy, tmp_path) -> None:
    trainer = make_trainer(audited_policy, tmp_path / "run", **{**SETTINGS, "max_steps": 2, "top_k": 5})
    planted = train_recorded(trainer)
    audit = audit_run(planted.run, "cpu")
    (found,) = [f for f in audit.findings if f.status not in (AGREES, RECOMPUTED)]
    assert found.metric == "surprisal against entropy" and found.status == DIFFERS and not audit.agrees
    assert (
        "not drawn from the distribution" in found.why and found.logged is not None and found.logged < found.recomputed
    )
    assert any("top_k=5" in note for note in audit.notes)


def test_the_samplers_own_log_probabilities(planted, tmp_path) -> None:
    """They agree where they are of the sampled distribution, and are named where they are of temperature 1."""
    for temperature, expected in ((0.7, AGREES), (1.0, DIFFERS)):
        folder = tmp_path / str(temperature)
        shutil.copytree(planted.run, folder)
        run = read_run(folder)
        policies = Policies(run, "cpu")
        for step in (1, 2, 3, 4):
            rows = read_step(folder, step) or []
            model = policies._model(step - 1)
            for row in (r for r in rows if r["part"] == GENERATED):
                ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
                logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1] / temperature
                chosen = logits.log_softmax(-1).gather(1, torch.tensor(row["completion_ids"])[:, None])
                row["sampler_logprobs"] = chosen[:, 0].tolist()
            write_step(folder, step, rows)
        audit = audit_run(folder, "cpu")
        found = of(audit, "surprisal by the sampler's own log-probabilities")
        assert len(found) == 4 and {f.status for f in found} == {expected}
        assert all("at temperature 1 " in f.why for f in found) == (expected == DIFFERS)


# ---------------------------------------------------------------------- this project's trainer
@pytest.fixture(scope="module")
def own_run(audited_policy, tmp_path_factory):
    """With refilling, two micro-batches a step and the probe."""
    config = tiny_train_config(
        audited_policy,
        tmp_path_factory.mktemp("own") / "run",
        task={"size": 8},
        rollouts={"prompts_per_step": 4, "completions_per_prompt": 2, "max_completion_length": 20},
        optimizer={"micro_batch_size": 4, "learning_rate": 3e-3},
        training={"steps": 4, "save_every": 1},
        entropy_probe={"mode": "simple", "preset": "accurate", "rollouts": "current", "eval_sequences": 6},
    )
    return run_training(config, quiet=True)


def test_a_run_of_ours_agrees_with_its_probe(own_run) -> None:
    run = read_run(own_run)
    assert any(len(run.record(step).rounds) > 1 for step in run.steps), "nothing was refilled: the test is blind"
    audit = audit_recorded(run, Policies(run, "cpu"), trust=True)
    assert statuses(audit) == {AGREES} and not audit.unaudited
    for name in ("entropy", "buffer/reward_first_round", "buffer/reward_trained", "entropy_probe/entropy"):
        assert len(of(audit, name)) == 4, name
    assert of(audit, "entropy_probe/measured") and of(audit, "entropy_probe/measured_fixed_prefix")
    assert any("every recorded reward is what 'tests.tiny_policy:even_start_reward' gives" in n for n in audit.notes)
    assert any("pass --trust" in n for n in audit_recorded(run, Policies(run, "cpu"), steps=[1]).notes)


def test_mistakes_in_the_probes_numbers(own_run) -> None:
    run = read_run(own_run)
    policies = Policies(run, "cpu")

    def turned(row):
        return {"entropy_probe/measured": -row["entropy_probe/measured"]}

    def without_weights(row):
        return {"entropy_probe/measured": row["entropy_probe/measured_fixed_prefix"]}

    for change, words in ((turned, "sign turned"), (without_weights, "without reweighting")):
        found = of(audit_recorded(changed(run, change), policies), "entropy_probe/measured")
        assert found and all(f.status == DIFFERS and words in f.why for f in found)
    other = changed(run, lambda row: {"entropy_probe/weights_ess": row["entropy_probe/weights_ess"] + 0.1})
    audit = audit_recorded(other, policies)
    assert not of(audit, "entropy_probe/entropy")
    assert any("not found again" in line for line in audit.unaudited)


def test_a_run_of_an_older_release(own_run, tmp_path) -> None:
    """Without recorded micro-batches entropy is known up to their order: a right log agrees, surprisal is still found."""
    shutil.copytree(own_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "recorded_steps")
    run = read_run(tmp_path / "run")
    policies = Policies(run, "cpu")
    audit = audit_recorded(run, policies)
    assert statuses(audit) == {AGREES}
    assert any("is not recorded (an older release" in note for note in audit.notes)
    assert any(f.tolerance > 1e-4 for f in of(audit, "entropy")), "no order matters: the test is blind"

    @torch.no_grad()
    def surprisal(row):
        means = [
            statistics(policies._model(row["step"] - 1), padded(batch), 1.0)
            for batch in read_run(own_run).record(row["step"]).micro_batches
        ]
        return {"entropy": float(np.mean([float((-lp * m).sum() / m.sum()) for _, lp, m in means]))}

    found = of(audit_recorded(changed(run, surprisal), policies), "entropy")
    wrong = [f for f in found if f.status != AGREES]
    assert len(wrong) >= 3 and all("surprisal" in f.why for f in wrong)


def padded(batch):
    """Recorded sequences as a trainer's micro-batch, prompts left-padded."""
    width, before = max(len(s.completion_ids) for s in batch), max(len(s.prompt_ids) for s in batch)

    def left(values):
        return [0] * (before - len(values)) + list(values)

    def right(values):
        return list(values) + [0] * (width - len(values))

    return {
        "prompt_ids": torch.tensor([left(s.prompt_ids) for s in batch]),
        "prompt_mask": torch.tensor([left([1] * len(s.prompt_ids)) for s in batch]),
        "completion_ids": torch.tensor([right(s.completion_ids) for s in batch]),
        "completion_mask": torch.tensor([right([1] * len(s.completion_ids)) for s in batch]),
    }


# ---------------------------------------------------------------------- the recorder
def test_recording_leaves_training_as_it_is(audited_policy, tmp_path) -> None:
    ends = []
    for recorded in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(audited_policy, tmp_path / str(recorded), max_steps=2, learning_rate=1e-3)
        if recorded:
            record_steps(trainer)
        trainer.train()
        ends.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert json.loads((tmp_path / "True" / "recorded_steps" / "run.json").read_text())["temperature"] == 1.0
    assert not (tmp_path / "False" / "recorded_steps").exists()
    assert math.isfinite(sum(float(p.sum()) for p in ends[0].values()))
