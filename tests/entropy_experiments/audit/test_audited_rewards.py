"""`audit` on logged rewards and lengths: a run of two reward functions, one of which does not judge every completion."""

from __future__ import annotations

import math
import statistics as stats
from dataclasses import replace

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from entropy_experiments.audit.audit import audit_recorded
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import read_run
from entropy_experiments.audit.verdicts import AGREES, DIFFERS, RECOMPUTED, UNEXPLAINED
from rl_training.integrations.step_recorder import record_steps
from rl_training.models.load import load_model_and_tokenizer
from rl_training.run.step_record import GENERATED, read_step
from tests.tiny_policy import even_start_reward

WEIGHTS = [1.0, 0.5]


def digits_reward(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """How many digits; None for a completion that starts with an upper-case letter."""
    return [None if c[:1].isupper() else float(sum(character.isdigit() for character in c)) for c in completions]


@pytest.fixture(scope="module")
def rewarded(audited_policy, tmp_path_factory):
    """A run's folder: one micro-batch a step, two functions of unequal weights; no policy is needed to audit its rewards."""
    folder = tmp_path_factory.mktemp("rewarded") / "run"
    model, tokenizer = load_model_and_tokenizer(str(audited_policy), device="cpu")
    arguments = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=5, logging_steps=1, save_steps=5, learning_rate=1e-3,
        per_device_train_batch_size=16, num_generations=4, max_completion_length=20, gradient_checkpointing=False,
        report_to=[], disable_tqdm=True, reward_weights=WEIGHTS,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(6) for b in range(4)])
    trainer = GRPOTrainer(
        model.requires_grad_(True), [even_start_reward, digits_reward], args=arguments, train_dataset=prompts,
        processing_class=tokenizer,
    )  # fmt: skip
    record_steps(trainer)
    trainer.train()
    return folder


@pytest.fixture(scope="module")
def policies(rewarded):
    return Policies(read_run(rewarded), "cpu")


def audit_with(policies, metric, value_of):
    """Findings on `metric`, as if the log had value_of(step's generated rows) there."""
    run = read_run(policies.run.folder)
    log = [
        {**row, metric: value_of(generated(policies.run.folder, row["step"]))} if metric in row else row
        for row in run.log
    ]
    audit = audit_recorded(replace(run, log=log), policies)
    assert all(f.status in (AGREES, RECOMPUTED) for f in audit.findings if f.metric != metric)
    return [f for f in audit.findings if f.metric == metric]


def generated(folder, step):
    rows = [row for row in read_step(folder, step) or [] if row["part"] == GENERATED]
    assert len(rows) == 16
    return rows


def reward(row, weights=WEIGHTS):
    known = [w * r for w, r in zip(weights, row["rewards"], strict=True) if r is not None]
    return sum(known) if known else math.nan


def lengths(rows):
    return [len(row["completion_ids"]) for row in rows]


def test_a_right_log_agrees_without_checkpoints(policies) -> None:
    """Rewards that are None among them. The last step alone has a checkpoint: the entropies of others are not audited, and that
    is said.
    """
    audit = audit_recorded(read_run(policies.run.folder), policies)
    held = [f for f in audit.findings if f.status != RECOMPUTED]
    assert {f.status for f in held} == {AGREES}
    for metric in ("reward", "reward_std", "rewards/digits_reward/mean", "rewards/digits_reward/std"):
        assert len([f for f in held if f.metric == metric]) == 5
    rows = [row for step in range(1, 6) for row in generated(policies.run.folder, step)]
    assert any(None in row["rewards"] for row in rows), "every completion was judged: the test is blind"
    assert [f.step for f in held if f.metric == "entropy"] == [1], "of the policy before training, the base model"
    assert len(audit.unaudited) == 4 and all("no checkpoint-" in line for line in audit.unaudited)


MISTAKES = {
    "another function": (
        "reward",
        lambda rows: stats.mean(row["rewards"][0] for row in rows),
        "even_start_reward' alone",
    ),
    "unweighted": ("reward", lambda rows: stats.mean(reward(row, [1.0, 1.0]) for row in rows), "unweighted"),
    "best of group": (
        "reward",
        lambda rows: stats.mean(max(reward(r) for r in rows[i : i + 4]) for i in range(0, 16, 4)),
        "each group's best",
    ),
    "median": ("reward", lambda rows: stats.median(reward(row) for row in rows), "a median in place of a mean"),
    "population deviation": (
        "reward_std",
        lambda rows: stats.pstdev(reward(row) for row in rows),
        "with n in place of n − 1",
    ),
    "deviation within groups": (
        "reward_std",
        lambda rows: stats.mean(stats.stdev(reward(r) for r in rows[i : i + 4]) for i in range(0, 16, 4)),
        "the mean of the groups' standard deviations",
    ),
    "without EOS": (
        "completions/mean_length",
        lambda rows: stats.mean(len(r["completion_ids"]) - (r["completion_ids"][-1] == 1) for r in rows),
        "the end-of-sequence token is left out",
    ),
    "padded": ("completions/mean_length", lambda rows: float(max(lengths(rows))), "padding is counted"),
    "with the prompt": (
        "completions/mean_length",
        lambda rows: stats.mean(len(r["completion_ids"]) + len(r["prompt_ids"]) for r in rows),
        "tokens of the prompt are counted",
    ),
    "ended, not clipped": (
        "completions/clipped_ratio",
        lambda rows: stats.mean(float(r["completion_ids"][-1] in (0, 1)) for r in rows),
        "those that ended by themselves",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named(policies, kind: str) -> None:
    metric, value_of, words = MISTAKES[kind]
    wrong = [f for f in audit_with(policies, metric, value_of) if f.status != AGREES]
    assert len(wrong) >= 3 and {f.status for f in wrong} == {DIFFERS}
    assert all(words in f.why for f in wrong), wrong[0].why


def test_lengths_of_other_steps(policies) -> None:
    """A log one step behind is named as that; one whose steps are shuffled too; for neither, no cause is made up."""
    folder = policies.run.folder
    by_step = {step: stats.mean(lengths(generated(folder, step))) for step in range(1, 6)}
    assert len(set(by_step.values())) == 5
    order = iter([1, 1, 2, 3, 4])
    late = audit_with(policies, "completions/mean_length", lambda rows: by_step[next(order)])
    assert [f.status for f in late] == [AGREES, *[DIFFERS] * 4]
    assert all("the value of the step before" in f.why for f in late[1:])
    shuffled = iter([3, 5, 2, 1, 4])
    found = audit_with(policies, "completions/mean_length", lambda rows: by_step[next(shuffled)])
    assert [f.status == AGREES for f in found] == [False, False, False, False, False]
    assert {f.status for f in found} == {DIFFERS}
    assert ["3", "5", "2", "1", "4"] == [
        f.why.removeprefix("numbers of other steps: this is the one of step ") for f in found
    ]
    some = iter([3, 5, 2, 5, 4])
    found = audit_with(policies, "completions/mean_length", lambda rows: by_step[next(some)])
    assert {f.status for f in found} == {UNEXPLAINED}, "no permutation, and no lag that holds at most steps"


def test_a_single_coarse_number_is_no_evidence(policies) -> None:
    """One mean of sixteenths is given by several alternatives: what fits is shown, and not named as the cause."""
    run, metric = read_run(policies.run.folder), "completions/mean_length"
    values = {row["step"]: row[metric] for row in run.log if metric in row}
    assert values[3] != values[2]
    log = [{**r, metric: values[2]} if metric in r and r["step"] == 3 else r for r in run.log]
    found = [f for f in audit_recorded(replace(run, log=log), policies).findings if f.metric == metric]
    assert [f.status for f in found] == [AGREES, AGREES, UNEXPLAINED, AGREES, AGREES]
    assert "the value of the step before" in found[2].why and found[2].difference == values[2] - values[3]


def test_rewards_of_another_built_in_function(policies) -> None:
    """What a built-in reward gives the same completions is among the alternatives, where the task says how to score."""
    run = read_run(policies.run.folder)
    rows = {step: generated(policies.run.folder, step) for step in range(1, 6)}
    other = {
        (tuple(r["prompt_ids"]), tuple(r["completion_ids"])): len(r["completion_ids"]) / 7
        for g in rows.values()
        for r in g
    }
    log = [{**r, "reward": stats.mean(lengths(rows[r["step"]])) / 7} if "reward" in r else r for r in run.log]
    found = audit_recorded(replace(run, log=log, other_rewards={"exact": other}), policies).findings
    assert all(f.status == DIFFERS and "'exact'" in f.why for f in found if f.metric == "reward")
