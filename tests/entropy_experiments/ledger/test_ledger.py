"""The ledger against torch's own optimizer and the run's own checkpoints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from entropy_core.adamw import AdamWParameterState, read_adamw_state
from entropy_experiments.console.ledger import ledger_lines
from entropy_experiments.ledger.accounts import DECAY, EARLIER, START, Accounts, GroupMomenta
from entropy_experiments.ledger.ledger import run_ledger
from entropy_experiments.ledger.partitions import KINDS, TOKENS, kind_of, token_kinds
from entropy_experiments.ledger.run_again import RunAgain
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.ledger_record import Ledger, LedgerRow
from entropy_experiments.records.record import json_of, validated
from entropy_experiments.records.summary import AgreementRecord
from entropy_experiments.step.optimizer_step import NextStep, clip_coefficient
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts, write_rollouts


def _optimizer(theta: nn.Parameter) -> torch.optim.AdamW:
    return torch.optim.AdamW([theta], lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


def _steps(count: int, most_bytes: int = 2**31) -> list[tuple[dict, torch.Tensor, dict]]:
    """(shares of the step by group, the step that torch takes, each group's clipped gradients so far) of a small problem."""
    generator = torch.Generator().manual_seed(3)

    def normal() -> torch.Tensor:
        return torch.randn(5, generator=generator, dtype=torch.float64)

    theta = nn.Parameter(normal())
    optimizer = _optimizer(theta)
    for _ in range(2):  # moments from before
        theta.grad = normal()
        optimizer.step()
    momenta, out = GroupMomenta(most_bytes), []
    momenta.start(_copied(read_adamw_state(optimizer, {"w": theta})))
    clipped: dict[str, list[torch.Tensor]] = {}
    for number in range(count):
        groups = {f"group {number % 2}": {"w": normal()}, f"only {number}": {"w": normal()}}
        whole = {"w": torch.stack([part["w"] for part in groups.values()]).sum(0)}
        clip, norm = clip_coefficient(whole, 1.0)
        before, start = _copied(read_adamw_state(optimizer, {"w": theta})), theta.detach().clone()
        step = NextStep({"w": start}, whole, clip, norm, before, frozenset())
        momenta.turn(step, groups, number)
        for name in {*clipped, *groups}:
            clipped.setdefault(name, [torch.zeros(5, dtype=torch.float64)] * number).append(
                clip * groups[name]["w"] if name in groups else torch.zeros(5, dtype=torch.float64)
            )
        shares = {key: part["w"] for key, part in momenta.steps(step).items()}
        theta.grad = clip * whole["w"]
        optimizer.step()
        out.append((shares, theta.detach() - start, {name: torch.stack(gs) for name, gs in clipped.items()}))
    return out


def _copied(states) -> dict[str, AdamWParameterState]:
    return {name: replace(s, exp_avg=s.exp_avg.clone(), exp_avg_sq=s.exp_avg_sq.clone()) for name, s in states.items()}


def test_shares_add_up_to_torchs_steps():
    for shares, taken, _ in _steps(6):
        assert torch.allclose(torch.stack([*shares.values()]).sum(0), taken, rtol=1e-12, atol=1e-14)
        assert {START, DECAY, "group 0"} <= shares.keys()


def test_a_batch_acts_on_through_momentum():
    """u_G of step t is -lr P_t / (1 - b1^n) times the sum of its earlier gradients by b1^(t - s) (1 - b1)."""
    found = _steps(6)
    shares, _, gradients = found[-1]
    own = {}
    for name, rows in gradients.items():
        age = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
        own[name] = (0.2 * 0.8 ** age[:, None] * rows).sum(0)
    scale = shares["group 0"] / own["group 0"]
    assert bool((scale < 0).all())
    for name in ("group 1", "only 0", "only 3"):
        assert torch.allclose(shares[name], scale * own[name], rtol=1e-10), name


def test_what_does_not_fit_is_added_up_and_the_sum_stays():
    whole, short = _steps(8), _steps(8, most_bytes=5 * 8 * 4)
    assert EARLIER in short[-1][0] and len(short[-1][0]) <= 6 < len(whole[-1][0])
    for (_, taken, _), (shares, _, _) in zip(whole, short, strict=True):
        assert torch.allclose(torch.stack([*shares.values()]).sum(0), taken, rtol=1e-12, atol=1e-14)


def test_accounts_sum_over_steps():
    accounts = Accounts()
    accounts.enter(["a", "b"], torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 1.0], [1.5, 3.0]]))
    accounts.enter(["b"], torch.tensor([4.0]), torch.tensor([[4.0], [5.0]]))
    value, left_out = accounts.total(["a", "b", "not there"])
    assert value == 7.0 and left_out.tolist() == [5.5, 9.5]


@pytest.fixture(scope="module")
def found(tiny_run) -> Ledger:
    return run_ledger(tiny_run, sequences=8, device="cpu", trust=True)


def test_a_runs_ledger_adds_up(found):
    assert (found.first_step, found.last_step) == (3, 4)
    total = found.predicted.value
    apart = sum(row.share.value for row in found.by_kind if row.name in (START, DECAY))
    assert sum(row.share.value for row in found.by_kind) == pytest.approx(total, abs=1e-9)
    for rows in (found.by_token, found.by_prompt):
        assert sum(row.share.value for row in rows) + apart == pytest.approx(total, rel=1e-4, abs=1e-8)
    assert {row.name for row in found.by_kind} <= {*KINDS, START, DECAY}
    assert {row.name for row in found.by_token} <= set(TOKENS)
    assert found.worst_gap is not None and found.worst_gap < 1e-3, "step 3, and 4 after it, end at checkpoint-4"
    assert found.predicted.low < total < found.predicted.high
    assert validated(Ledger, json.loads(json.dumps(json_of(found))), "ledger") == found
    assert found.agreement is not None and found.agreement.paired
    assert found.agreement.difference == pytest.approx(total - found.measured.value)
    lines = ledger_lines(found)
    assert f"what steps up to {found.first_step - 1} left in it" in str(lines)
    assert lines[0].startswith("Steps 3 to 4: entropy was predicted to change by") and "By token" in "\n".join(lines)
    assert any(line.startswith("The accounting share of a group") for line in lines)


def test_prompts_are_told_apart():
    """They begin alike, and the beginning was all that stood there."""
    texts = [
        f"You are a careful assistant who answers with only the number that was asked for. {n} + 3 = ?"
        for n in (12, 47)
    ]
    lines = "\n".join(ledger_lines(_ledger(by_prompt=[_row(text, n) for n, text in enumerate(texts)])))
    assert "prompt 0, \u201c12 + 3 = ?\u201d: " in lines and "prompt 1, \u201c47 + 3 = ?\u201d: " in lines
    assert "careful" not in lines and "  the other 2 prompts: " in "\n".join(
        ledger_lines(_ledger(by_prompt=[_row(texts[0], 0), _row("the other 2 prompts")]))
    )


def test_prediction_and_measurement_are_held_against_each_other():
    def first(eval_sequences: int = 64, **changes) -> str:
        return "\n".join(ledger_lines(_ledger(eval_sequences=eval_sequences, **changes)))

    near = AgreementRecord(
        difference=0.02, standard_error=0.02, degrees_of_freedom=63.0, z=1.0, p_value=0.32, low=-0.02, high=0.06, paired=True,
        agrees=True,
    )  # fmt: skip
    apart = near.model_copy(update={"low": 0.01, "high": 0.03, "agrees": False})
    assert "They cannot be distinguished: they differ by +0.020 [−0.020, +0.060]" in first(agreement=near)
    assert "They do NOT agree" in first(agreement=apart)
    assert "Whether they agree cannot be said: the difference has no error" in first()
    assert "take at least 12" in first(eval_sequences=8, agreement=near) and "take at least" not in first(
        agreement=near
    )
    assert "Few of the 64 evaluation prompts carry the error of the measured change" in first(
        measured=_estimate(-0.12, 2.0)
    )
    assert "right: ended, with a reward of 0.5 or more; wrong: " in first()


def _row(name: str, prompt_index: int | None = None) -> LedgerRow:
    return LedgerRow(name=name, prompt_index=prompt_index, share=_estimate(-0.01))


def _estimate(value: float, freedom: float = 40.0) -> StudentEstimate:
    ends = {"low": value - 0.02, "high": value + 0.02}
    return StudentEstimate(value=value, standard_error=0.01, degrees_of_freedom=freedom, **ends)


def _ledger(**changes) -> Ledger:
    values = {
        "first_step": 3, "last_step": 4, "predicted": _estimate(-0.1), "measured": _estimate(-0.12), "by_kind": [],
        "by_token": [], "by_prompt": [], "prompts": 4, "eval_sequences": 64, "worst_gap": 0.0,
    }  # fmt: skip
    return Ledger(**(values | changes))


def test_steps_are_those_of_the_run(tiny_run):
    again = RunAgain(tiny_run, "cpu", True)
    numbers = [(one.number, one.step.clip) for one in again.steps()]
    assert [number for number, _ in numbers] == [3, 4] and again.worst_gap is not None


def test_other_sequences_than_the_runs_are_refused(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    rows = [replace(s, weight=-s.weight, advantage=-s.advantage) for s in read_rollouts(copy, 3)]
    write_rollouts(copy, 3, rows)
    with pytest.raises(UserError, match="of the way off checkpoint-4"):
        for _ in RunAgain(copy, "cpu", True).steps():
            pass


def test_a_gap_in_the_records_is_refused(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "run")
    (copy / "rollouts" / "step-000003.parquet").unlink()
    with pytest.raises(UserError, match="every step between them"):
        RunAgain(copy, "cpu", True)
    for path in copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="set training.save_every"):
        RunAgain(copy, "cpu", True)


def test_what_is_no_run_is_told_apart(tiny_run, tmp_path):
    """Of a checkpoint and of a folder that is not there it was said that they hold no checkpoint: set training.save_every."""
    with pytest.raises(UserError, match="is one checkpoint: .* name the run"):
        RunAgain(next(tiny_run.glob("checkpoint-*")), "cpu", True)
    with pytest.raises(UserError, match="does not exist"):
        RunAgain(tmp_path / "nothing", "cpu", True)


def test_tokens_and_sequences_are_told_apart():
    assert kind_of(1.0, (5, 9), (9,)) == "right" and kind_of(0.0, (5, 9), (9,)) == "wrong"
    assert kind_of(1.0, (5, 6), (9,)) == "cut off" and kind_of(None, (9,), (9,)) == "wrong"
    from entropy_core.batch import SequenceBatch

    batch = SequenceBatch.from_sequences([[1, 2]], [[3, 4, 5, 6, 9]], [0], 0, 1.0, [None])
    texts = {3: " 7", 4: " 12", 5: "word", 6: ".", 9: "<eos>"}
    kinds = token_kinds(batch, texts.__getitem__, (9,))[0]
    assert [TOKENS[k] for k in kinds.tolist() if k >= 0] == [
        "first token", "digits", "letters", "other tokens", "end of sequence",
    ]  # fmt: skip
