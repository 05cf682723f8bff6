"""The ledger of a run: shares of the predicted change of entropy by kind of sequence, by token and by prompt, with their errors.

Each step's gradient of entropy is of fresh completions of the same held-out prompts. A share is a sum over steps; its error is a
jackknife over these prompts, each left out of every step at once. Source: docs/analyses/ledger.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from entropy_core.measurement import EntropyMeasurement
from entropy_core.passes.forward import input_device
from entropy_core.scores import token_statistics
from entropy_core.uncertainty import jackknife_standard_error
from entropy_experiments.ledger.accounts import DECAY, EARLIER, START, Accounts, GroupMomenta, Key
from entropy_experiments.ledger.partitions import KINDS, TOKENS, Gradient, by_token
from entropy_experiments.ledger.run_again import RecordedStep, RunAgain
from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.ledger_record import Ledger, LedgerRow
from entropy_experiments.records.summary import AgreementRecord
from entropy_experiments.run.reporter import SILENT, Reporter
from entropy_experiments.statistics.agreement import compare
from entropy_experiments.statistics.estimand import POLICY
from entropy_experiments.statistics.jackknife_interval import ends_of
from entropy_experiments.step.evaluation_products import EvaluationProducts, EvaluationSide
from entropy_experiments.step.fresh_samples import fresh_entropy_change
from entropy_experiments.step.row_products import products_with_steps
from entropy_experiments.text.numbers import counted
from rl_training.errors import UserError
from rl_training.sampling import draw

NAMED_PROMPTS = 10
_STREAM = 3_000_003


def run_ledger(
    run: Path,
    sequences: int = 64,
    device: str = "auto",
    trust: bool = False,
    last: int | None = None,
    named_prompts: int = NAMED_PROMPTS,
    reporter: Reporter = SILENT,
) -> Ledger:
    """The ledger of a run folder, from its first checkpoint to its last.

    Args:
        run: folder with checkpoints and recorded sequences (`rollouts/`).
        sequences: held-out prompts, each with one completion at every step.
        device: where to compute.
        trust: whether the run's task may open files and import.
        last: step to stop at.
        named_prompts: training prompts that are listed; the others are added up.
        reporter: is told of each step.

    Raises:
        UserError: a run that does not hold what is needed, or whose steps cannot be had again.
    """
    again = RunAgain(run, device, trust, last)
    rows = again.plan.task.heldout[:sequences]
    if len(rows) < 2:
        raise UserError(f"{run}: its task has {len(rows)} held-out prompts: a ledger needs some to take entropy on")
    accounts, texts, change = _through(again, rows, reporter)
    predicted, without = accounts.total(_of(accounts, "kind"))
    compared = compare({"value": predicted, "left_out": without}, change)
    return Ledger(
        first_step=again.first + 1,
        last_step=again.last,
        predicted=_estimate(predicted, without),
        measured=_estimate(change.change, change.left_out),
        agreement=None if compared is None else AgreementRecord(**compared.as_dict()),
        by_kind=_rows(accounts, "kind", (*KINDS, START, DECAY)),
        by_token=_rows(accounts, "token", TOKENS),
        by_prompt=_by_prompt(accounts, texts, named_prompts),
        prompts=len(texts),
        eval_sequences=len(rows),
        worst_gap=again.worst_gap,
    )


def _through(
    again: RunAgain, rows: list[dict], reporter: Reporter
) -> tuple[Accounts, dict[int, str], EntropyMeasurement]:
    """All steps: the accounts, the training prompts' texts, and the measured change."""
    momenta = {name: GroupMomenta() for name in ("kind", "token", "prompt")}
    momenta["kind"].start(again.state)
    accounts = Accounts()
    texts: dict[int, str] = {}
    before: EvaluationSide | None = None
    for recorded in again.steps():
        reporter.stage(f"step {recorded.number} of {again.last}")
        seen = _look(again, rows, recorded.number)
        before = before or seen
        texts |= {s.prompt_index: s.prompt for s in recorded.rollouts if s.prompt_index is not None and s.weight}
        _enter(again, recorded, seen, momenta, accounts)
    assert before is not None
    after = _look(again, rows, again.last + 1)
    change = fresh_entropy_change(before.statistics, before.batch, after.statistics, after.batch)
    return accounts, texts, change


def _look(again: RunAgain, rows: list[dict], seed: int) -> EvaluationSide:
    sampling = again.plan.sampling_config
    drawn = draw(again.model, again.checkpoint.tokenizer, rows, 1, sampling, seed + _STREAM, "evaluation")
    batch = drawn.to_batch(sampling).to(input_device(again.model))
    return EvaluationSide(batch, token_statistics(again.model, batch, again.passes), POLICY)


def _enter(
    again: RunAgain,
    recorded: RecordedStep,
    side: EvaluationSide,
    momenta: dict[str, GroupMomenta],
    accounts: Accounts,
) -> None:
    """One step's shares into the accounts."""
    tokenizer, ends = again.checkpoint.tokenizer, again.plan.sampling_config.eos_token_ids

    def decode(token: int) -> str:
        return str(tokenizer.decode([token]))

    of_tokens = by_token(again.model, recorded.batch, recorded.weights, recorded.whole, decode, ends, again.passes)
    gradients = {
        "kind": _summed(recorded, 1),
        "token": of_tokens,
        "prompt": _summed(recorded, 0),
    }
    steps: dict[Hashable, dict[str, Tensor]] = {}
    for name, own in momenta.items():
        own.turn(recorded.step, gradients[name], recorded.number)
        found = own.steps(recorded.step)
        steps |= {(name, key): found[key] for key in found if key is not DECAY or name == "kind"}
    products = EvaluationProducts(side, products_with_steps(again.model, side, list(steps.values()), again.passes))
    estimator = side.estimand.gradient
    values = products.of(estimator, True).mean(0).cpu()
    accounts.enter(steps, values, products.without_each_prompt(estimator, True).cpu())


def _summed(recorded: RecordedStep, place: int) -> dict[Hashable, Gradient]:
    """The gradients of (prompt, kind), added up by one of the two."""
    found: dict[Hashable, Gradient] = {}
    for key, gradient in recorded.gradients.items():
        mine = found.setdefault(key[place], {name: torch.zeros_like(g) for name, g in gradient.items()})
        for name, g in gradient.items():
            mine[name] = mine[name] + g
    return found


# ---- the record


def _of(accounts: Accounts, partition: str) -> list[Key]:
    return [key for key in accounts.values if isinstance(key, tuple) and key[0] == partition]


def _rows(accounts: Accounts, partition: str, names: Iterable[str]) -> list[LedgerRow]:
    keys = [key for name in names if (key := (partition, name)) in accounts.values]
    return [LedgerRow(name=key[1], share=_estimate(*accounts.total([key]))) for key in keys]


def _by_prompt(accounts: Accounts, texts: dict[int, str], named: int) -> list[LedgerRow]:
    """Those of largest shares, and the sum of the others."""
    order = sorted(
        (number for number in texts if ("prompt", number) in accounts.values),
        key=lambda number: -abs(accounts.values["prompt", number]),
    )
    found = [
        LedgerRow(name=texts[n], prompt_index=n, share=_estimate(*accounts.total([("prompt", n)])))
        for n in order[:named]
    ]
    rest: list[Key] = [("prompt", number) for number in order[named:]]
    if ("prompt", EARLIER) in accounts.values:
        rest.append(("prompt", EARLIER))
    if rest:
        label = f"the other {counted(len(order[named:]), 'prompt')}"
        found.append(LedgerRow(name=label, share=_estimate(*accounts.total(rest))))
    return found


def _estimate(value: float, left_out: Tensor | None) -> StudentEstimate:
    assert left_out is not None
    error = jackknife_standard_error(left_out)
    if not np.isfinite(error):
        return StudentEstimate(value=value, standard_error=None, degrees_of_freedom=None, reason="too few prompts")
    return StudentEstimate(value=value, standard_error=float(error), **ends_of(value, left_out.double().numpy()))
