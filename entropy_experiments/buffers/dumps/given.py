"""A side of the kernel that is a dump of rollouts: its rows as sequences, its weights, and whether they are this policy's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from entropy_core.passes.settings import PassSettings
from entropy_core.weighting import longest_of_prompt
from entropy_experiments.buffers.custom import PromptNumbers
from entropy_experiments.buffers.dumps.read import import_rollouts
from entropy_experiments.buffers.dumps.recorded_logprobs import compare_logprobs, drawn_by
from entropy_experiments.buffers.dumps.rows import Mistakes, RolloutRow, RolloutTable
from entropy_experiments.buffers.dumps.tokens import tokenize_rows
from entropy_experiments.buffers.sampling_plan import SamplingPlan
from entropy_experiments.checkpoint_loader import Checkpoint
from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import tokenize_prompts
from rl_training.sampling import Rollouts, prompt_text
from rl_training.sequences import RolloutSequence

Side = Literal["evaluation", "training"]
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class GivenSide:
    """rollouts: the sequences. groups: (N,) int64, those that share a baseline. advantages, weights: (N,) float64 as recorded,
    None where they were not. notes: what has to be said of them.
    """

    rollouts: Rollouts
    groups: torch.Tensor
    advantages: torch.Tensor | None
    weights: torch.Tensor | None
    notes: list[str]


def given_side(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    path: Path,
    numbers: PromptNumbers,
    side: Side,
    step: int | None,
    claimed_drawn: bool = False,
    token_batch_size: int = 2048,
) -> GivenSide:
    """Read one side from a dump, and hold it against the policy.

    Args:
        checkpoint: Whose policy, tokenizer and step are asked.
        plan: Task and sampling distribution of the analysis.
        path: File or folder, as `import_rollouts` takes it.
        numbers: Numbers prompts, of both sides alike.
        side: Rows were made of the checkpoint's step (training), or drawn for the next one (evaluation).
        step: The step whose rows are taken; None: the side's own, or the only one there is.
        claimed_drawn: Whether the user says that this checkpoint's policy drew them.
        token_batch_size: Padded tokens in one pass.

    Raises:
        UserError: Bad rows; recorded log-probabilities that contradict the policy; sequences that the policy cannot have drawn
            where it is said to have.
    """
    table = _table(path, side, step, checkpoint.record.step)
    task_rows = numbers.task_rows
    found = tokenize_rows(
        table,
        checkpoint.tokenizer,
        plan.sampling_config,
        plan.system_prompt,
        [row["prompt"] for row in task_rows],
        _vocabulary(checkpoint),
    )
    rows = _prompt_rows(checkpoint.tokenizer, plan, numbers, table.rows, found.prompt_ids, found.prompts)
    status = "evaluation" if side == "evaluation" else "trained"
    shown = checkpoint.tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
    tokens = zip(found.prompt_ids, found.completion_ids, found.drawn, strict=True)
    rollouts = Rollouts(
        tuple(
            _sequence(row, of_task, prompt, completion, drawn, text, status)
            for row, of_task, (prompt, completion, drawn), text in zip(table.rows, rows, tokens, shown, strict=True)
        )
    )
    groups = _groups(table, rollouts)
    advantages, weights = (_column(table.rows, name) for name in ("advantage", "weight"))
    notes = [f"{side} sequences are {len(rows)} of {table.format}, from {path}", *found.notes]
    if side == "training":
        notes += _weight_notes(table, groups, advantages, weights)
    passes = PassSettings(token_batch_size)
    notes += _held_against_policy(checkpoint, plan, path, rollouts, table.rows, side, claimed_drawn, passes)
    return GivenSide(rollouts, groups, advantages, weights, notes)


def _sequence(
    row: RolloutRow,
    of_task: dict[str, Any],
    prompt: Sequence[int],
    completion: Sequence[int],
    drawn: Sequence[bool] | None,
    text: str,
    status: str,
) -> RolloutSequence:
    return RolloutSequence(
        tuple(prompt),
        tuple(completion),
        advantage=math.nan if row.advantage is None else row.advantage,
        weight=math.nan if row.weight is None else row.weight,
        drawn=None if drawn is None else tuple(drawn),
        sampler_logprobs=None if row.sampler_logprobs is None else tuple(row.sampler_logprobs),
        prompt_index=int(of_task["prompt_index"]),
        prompt=prompt_text(of_task["prompt"]),
        completion=text,
        prompt_row=of_task,
        reward=row.reward,
        status=status,
        step=row.step or 0,
    )


def advantage_weights(given: GivenSide, plan: SamplingPlan) -> torch.Tensor:
    """(N,) float64: w_i = A_i / (N L) of recorded advantages, L the normaliser of Dr-GRPO's loss."""
    assert given.advantages is not None
    if plan.length_normalizer == "prompt_longest":
        length = longest_of_prompt(torch.tensor(given.rollouts.lengths), given.groups).double()
        return given.advantages / (len(given.rollouts) * length)
    return given.advantages / (len(given.rollouts) * plan.sampling_config.max_completion_length)


def _table(path: Path, side: Side, step: int | None, own_step: int) -> RolloutTable:
    unfiltered = side == "evaluation"
    key = "eval_sequences_step" if unfiltered else "train_sequences_step"
    wanted = own_step + 1 if unfiltered else own_step
    if step is not None:
        return import_rollouts(path, step, unfiltered)
    if not path.expanduser().is_dir():
        table = import_rollouts(path, None, unfiltered)
        if len(table.steps) <= 1:
            return table
        if wanted not in table.steps:
            raise UserError(
                f"{path} holds sequences of steps {table.steps[0]} to {table.steps[-1]}, none of step {wanted}: name one with "
                f"entropy_analysis.sampling.{key}"
            )
    try:
        return import_rollouts(path, wanted, unfiltered)
    except UserError as error:
        if "holds no" not in str(error):
            raise
        raise UserError(f"{error}; name one with entropy_analysis.sampling.{key}") from None


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    get = getattr(checkpoint.model, "get_input_embeddings", None)
    return None if get is None else int(get().weight.shape[0])


def _prompt_rows(
    tokenizer: Any,
    plan: SamplingPlan,
    numbers: PromptNumbers,
    rows: Sequence[RolloutRow],
    prompt_ids: Sequence[Sequence[int]],
    shown: Sequence[Any],
) -> list[dict[str, Any]]:
    """A task row for each sequence: the task's own where the tokens are those of one of its prompts."""
    rendered = tokenize_prompts(tokenizer, [row["prompt"] for row in numbers.task_rows], plan.sampling_config.rendering)
    of_task = {tuple(ids): row for ids, row in zip(rendered, numbers.task_rows, strict=True)}
    found = []
    for row, ids, prompt in zip(rows, prompt_ids, shown, strict=True):
        known = of_task.get(tuple(ids))
        if known is not None:
            found.append(known)
            continue
        is_chat = row.prompt is not None and row.prompt_form == "chat"
        number = numbers.number(json.dumps(prompt, sort_keys=True) if is_chat else f"tokens {list(ids)}")
        found.append({"prompt": prompt, "prompt_index": number})
    return found


def _groups(table: RolloutTable, rollouts: Rollouts) -> torch.Tensor:
    """(N,) int64: rows of one group and step; of one prompt and step where no group was recorded.

    Raises UserError where a group that makes weights holds two prompts.
    """
    keys, first = [], {}
    mistakes = Mistakes(table.path, table.rows[0].place.split()[0])
    from_rewards = all(row.advantage is None and row.weight is None for row in table.rows)
    for i, row in enumerate(table.rows):
        key = (
            (row.step, "prompt", tuple(rollouts.prompt_ids[i])) if row.group is None else (row.step, "group", row.group)
        )
        other = first.setdefault(key, i)
        if from_rewards and rollouts.prompt_ids[other] != rollouts.prompt_ids[i]:
            mistakes.add(
                i + 1,
                f"group {row.group} has another prompt here than in {table.rows[other].place}: give each prompt its own",
            )
        keys.append(key)
    mistakes.refuse()
    order = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([order[key] for key in keys])


def _column(rows: Sequence[RolloutRow], name: str) -> torch.Tensor | None:
    values = [getattr(row, name) for row in rows]
    return None if any(v is None for v in values) else torch.tensor(values, dtype=torch.float64)


def _weight_notes(
    table: RolloutTable, groups: torch.Tensor, advantages: torch.Tensor | None, weights: torch.Tensor | None
) -> list[str]:
    rewards = _column(table.rows, "reward")
    sizes = torch.bincount(groups)
    notes = []
    if weights is None and advantages is None and rewards is not None:
        if int(sizes.max()) == 1:
            raise UserError(
                f"{table.path} has rewards, no advantages, and no two sequences of one group: nothing to compare a reward "
                "with; give group, advantage or weight"
            )
        notes.append(
            f"advantages are Dr-GRPO's, reward minus the mean of its group, of {len(sizes)} groups of {int(sizes.min())} to "
            f"{int(sizes.max())}: those of the run differ where it divides by a standard deviation, weighs reward functions or "
            "subtracts another baseline"
        )
        if int(sizes.min()) < int(sizes.max()):
            notes.append(
                "groups have several sizes: where a part of one is not in the dump, its baseline is the mean of what is left"
            )
    if advantages is not None and weights is None:
        notes.append("weights are the recorded advantages over N L, as in Dr-GRPO's loss, whatever loss the run had")
    if advantages is not None:
        sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, advantages)
        off = int((sums.abs() > _SUM_TOLERANCE * float(advantages.abs().max()) * sizes).sum())
        if off:
            notes.append(
                f"recorded advantages of {off} of {len(sizes)} groups do not add up to 0 (largest sum "
                f"{float(sums[sums.abs().argmax()]):+.3g}): a part of the group is missing, or the baseline is no mean of its "
                "group; they are taken as they are"
            )
    if advantages is not None and rewards is not None:
        against = sum(_against(advantages[groups == g], rewards[groups == g]) for g in range(len(sizes)))
        if against:
            notes.append(
                f"recorded advantages of {against} of {len(sizes)} groups do not rise with the reward: rows may be mixed up, or "
                "the reward is not what was trained on; advantages are taken as they are"
            )
    copies = Counter(
        (tuple(r.completion_ids or ()), tuple(r.sampler_logprobs)) for r in table.rows if r.sampler_logprobs
    )
    repeated = sum(n - 1 for (ids, _), n in copies.items() if len(ids) > 4)
    if repeated:
        notes.append(
            f"{repeated} sequences stand twice, to the last digit of their log-probabilities: was a file read twice?"
        )
    return notes


def _against(advantages: torch.Tensor, rewards: torch.Tensor) -> bool:
    steps = (advantages[:, None] - advantages[None, :]) * (rewards[:, None] - rewards[None, :])
    return bool((steps < -1e-9).any())


def _held_against_policy(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    path: Path,
    rollouts: Rollouts,
    rows: Sequence[RolloutRow],
    side: Side,
    claimed_drawn: bool,
    passes: PassSettings,
) -> list[str]:
    device = next(checkpoint.model.parameters()).device
    batch = rollouts.to_batch(plan.sampling_config).to(device)
    recorded = [row.drawn_logprobs if row.sampler_logprobs is not None else None for row in rows]
    compared = compare_logprobs(checkpoint.model, batch, recorded, passes)
    notes = []
    if compared is not None:
        tolerable = compared.agrees or (compared.cause == "other checkpoint" and not claimed_drawn)
        if not tolerable:
            raise UserError(f"{path}: {compared.sentence()}")
        notes.append(f"{side}: {compared.sentence()}")
    elif claimed_drawn:
        notes.append(
            f"{side}: no log-probabilities were recorded, so that only surprisal against entropy says who drew it"
        )
    if claimed_drawn:
        check = drawn_by(checkpoint.model, batch, passes)
        if check.alarmed:
            raise UserError(
                f"{path}: eval_sequences_drawn=true, but {check.sentence()}; give what this checkpoint's policy drew at "
                f"temperature {plan.sampling_config.temperature:g}, all of it, or set eval_sequences_drawn=false"
            )
        notes.append(f"{side}: surprisal and entropy agree (z = {check.z:+.1f}), as of the policy's own draws")
    return notes
