"""What a logged mean over tokens may be the mean of: a definition with one field for each choice,
and its value at a step.

The definition with every field at its default is TRL's: entropy at the sampling temperature, of the
tokens in the loss, under the policy that the step began with, averaged over the tokens of a
micro-batch and then over micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_experiments.audit.definition import Definition
from entropy_experiments.audit.policies import Policies, TokenValues
from entropy_experiments.audit.recorded_run import RecordedRun, Sequence, StepRecord
from rl_training.run.step_record import RunSettings


@dataclass(frozen=True)
class TokenDefinition(Definition):
    """Each field's values, and what each means in words, stand in `ALTERNATIVES`."""

    quantity: str = "entropy"
    temperature: float | None = None
    """None: the sampling temperature."""
    tokens: str = "loss"
    sequences: str = "loss"
    average: str = "micro_batches"
    unit: str = "nats"
    policy: str = "before"
    precision: str = "run"
    lag: int = 0
    window: str = "mean"


ALTERNATIVES: dict[str, dict[Any, str]] = {
    "quantity": {
        "surprisal": "surprisal (−log π of the tokens drawn) in place of entropy",
        "squared": "the squared log-probability in place of entropy",
        "k3": "the k3 estimate of KL: exp(r) − r − 1, r = log π_ref − log π",
        "k1": "the k1 estimate of KL: log π − log π_ref",
        "k2": "the k2 estimate of KL: (log π − log π_ref)² / 2",
        "k3_reversed": "k3 with policy and reference exchanged",
    },
    "temperature": {1.0: "at temperature 1 in place of the sampling temperature {temperature:g}"},
    "tokens": {
        "foreign": "tokens that the policy did not draw (tools, an environment) are counted",
        "without_eos": "the end-of-sequence token is left out",
        "padding": "padding is counted, with the entropy predicted at it",
        "padding_as_zero": "padding is counted, as zeros",
        "late": "taken one position late (logits not shifted against tokens)",
        "with_prompt": "tokens of the prompt are counted",
        "without_first": "the first token of each completion is left out",
    },
    "sequences": {
        "loss_terminated": "truncated sequences are left out",
        "generated": "over all generated sequences, not those in the loss alone (filtering, masking)",
        "generated_terminated": "over all generated sequences but the truncated ones",
        "loss_shorter": "sequences of the maximal length are left out",
        "informative": "over the filtered batch alone (groups whose rewards differ)",
        "loss_informative": "over the filtered batch alone (groups whose rewards differ)",
        "first_round": "over the first round of generation alone",
        "one_rank": "over the main process's sequences alone",
    },
    "average": {
        "tokens": "mean over all tokens of the step, not of micro-batches' means",
        "sequences": "mean of each sequence's mean, not mean over tokens",
        "completions": "sum per completion, not mean per token",
        "longest_allowed": "sum per completion divided by max_completion_length",
        "first_micro_batch": "the step's first micro-batch alone",
        "last_micro_batch": "the step's last micro-batch alone",
    },
    "unit": {
        "bits": "in bits, not nats",
        "exp": "its exponential (perplexity)",
        "negated": "with its sign turned",
    },
    "policy": {
        "after": "under the policy after the step (weights of the next checkpoint)",
        "stale": "under the policy one step earlier",
        "generation": "under the policy that generated the sequences",
        "beginning": "under the policy before training",
    },
    "precision": {
        "bf16": "computed in bfloat16",
        "fp16": "computed in float16",
        "float32": "computed in float32, not in the run's own precision",
    },
    "lag": {-1: "the value of the step before", 1: "the value of the step after"},
    "window": {
        "last": "of the last step since the last log alone, not the mean over them",
        "first": "of the first step since the last log alone, not the mean over them",
        "tokens": "over all tokens since the last log, not the mean of steps' means",
    },
}
_OF_KL = ("k3", "k1", "k2", "k3_reversed")


def words(changes: Many[tuple[str, Any]], settings: RunSettings) -> str:
    """The changes of one definition against TRL's, for a person."""
    said = []
    for name, value in changes:
        known = (
            ALTERNATIVES[name].get(value)
            or f"at temperature {value:.4g} in place of the sampling temperature {{temperature:g}}"
        )
        said.append(known.format(temperature=settings.temperature))
    return " and ".join(said)


class TokenMeans:
    """Values of definitions at logged windows of steps."""

    def __init__(self, run: RecordedRun, policies: Policies) -> None:
        self._run, self._policies, self._settings = run, policies, run.settings
        self._drawn_at: dict[Any, int] = {}
        self._informative: set[Any] = set()
        for step in sorted(run.steps):
            for group in (g for generated in run.record(step).rounds for g in groups_of(generated, self._settings)):
                self._drawn_at |= {(s.prompt_ids, s.completion_ids): step for s in group}
                if differs(group, self._settings):
                    self._informative |= {(s.prompt_ids, s.completion_ids) for s in group}

    def value(self, definition: TokenDefinition, steps: range) -> float:
        """NaN where the definition has no value there.

        Raises:
            UserError: a policy cannot be had.
        """
        parts: list[list[tuple[float, float]]] = []
        for step in steps:
            record = self._run.record(step + definition.lag) if step + definition.lag >= 1 else None
            if record is None:
                return math.nan
            parts.append(self._batches(definition, record))
        parts = [p for p in parts if p]
        if not parts:
            return math.nan
        if definition.window in ("first", "last"):
            parts = [parts[0] if definition.window == "first" else parts[-1]]
        entries = [entry for part in parts for entry in part]
        if definition.window == "tokens":
            entries = [(sum(total for total, _ in entries), sum(count for _, count in entries))]
        means = [_in_unit(total / count, definition.unit) for total, count in entries if count > 0]
        return float(np.mean(means)) if means else math.nan

    # ------------------------------------------------------------------ one step
    def _batches(self, d: TokenDefinition, record: StepRecord) -> list[tuple[float, float]]:
        """(sum, count) of what the step appended to the trainer's list of this metric."""
        batches = [b for b in (list(b) for b in self._sequences(d.sequences, record)) if b]
        self._pass_once(d, [row for batch in batches for row in batch], record.step)
        if d.average == "first_micro_batch":
            batches = batches[:1]
        elif d.average == "last_micro_batch":
            batches = batches[-1:]
        found = []
        for batch in batches:
            kept = [(row, self.tokens_of(d, row, record.step)) for row in batch]
            found.append([(total, count) for _, (total, count) in kept if count > 0])
        if d.average == "tokens":
            found = [[pair for pairs in found for pair in pairs]]
        out = []
        for pairs in found:
            if not pairs:
                continue
            total = sum(t for t, _ in pairs)
            if d.average == "sequences":
                out.append((sum(t / c for t, c in pairs), float(len(pairs))))
            elif d.average == "completions":
                out.append((total, float(len(pairs))))
            elif d.average == "longest_allowed":
                out.append((total, float(len(pairs) * self._settings.max_completion_length)))
            else:
                out.append((total, sum(c for _, c in pairs)))
        return out

    def _pass_once(self, d: TokenDefinition, rows: Many[Sequence], step: int) -> None:
        """One forward pass over all rows of a policy, so that single rows are looked up."""
        temperature = self._settings.temperature if d.temperature is None else d.temperature
        needed: dict[int, list[Sequence]] = {}
        for row in rows:
            needed.setdefault(self.policy_steps(d.policy, step, row), []).append(row)
        if d.quantity in _OF_KL:
            needed[0] = list(rows)
        for steps in sorted(needed):
            self._policies.values(steps, d.precision, temperature, needed[steps])

    def _sequences(self, which: str, record: StepRecord) -> Many[Many[Sequence]]:
        loss, rounds = record.micro_batches, record.rounds
        if which == "loss":
            return loss
        if which == "loss_terminated":
            return [[s for s in batch if not self.truncated(s)] for batch in loss]
        if which == "loss_shorter":
            longest = self._settings.max_completion_length
            return [[s for s in batch if len(s.completion_ids) < longest] for batch in loss]
        if which == "loss_informative":
            return [[s for s in batch if (s.prompt_ids, s.completion_ids) in self._informative] for batch in loss]
        if which == "one_rank":
            return [[s for s in batch if s.rank == 0] for batch in loss]
        everything = [s for generated in rounds for s in generated]
        if which == "generated":
            return [everything]
        if which == "generated_terminated":
            return [[s for s in everything if not self.truncated(s)]]
        if which == "first_round":
            return rounds[:1]
        return [
            [
                s
                for generated in rounds
                for group in groups_of(generated, self._settings)
                if differs(group, self._settings)
                for s in group
            ]
        ]

    def truncated(self, s: Sequence) -> bool:
        """TRL's rule: the last token ends nothing."""
        ends = {*self._settings.eos_token_ids, self._settings.pad_token_id}
        return not s.completion_ids or s.completion_ids[-1] not in ends

    def tokens_of(self, d: TokenDefinition, row: Sequence, step: int) -> tuple[float, float]:
        """(sum over the tokens that count, how many they are)."""
        start, n, end = len(row.prompt_ids), len(row.completion_ids), max(row.width, len(row.completion_ids))
        at = start + np.flatnonzero(np.asarray(row.mask, dtype=bool))
        if d.tokens == "foreign":
            at = start + np.arange(n) if any(row.mask) else at
        elif (
            d.tokens == "without_eos" and len(at) and row.completion_ids[at[-1] - start] in self._settings.eos_token_ids
        ):
            at = at[:-1]
        elif d.tokens == "without_first":
            at = at[1:]
        elif d.tokens == "late":
            at = at + 1
        elif d.tokens == "with_prompt":
            at = np.concatenate([np.arange(1, start), at])
        elif d.tokens == "padding":
            at = np.concatenate([at, start + np.arange(n, end)])
        count = float(end if d.tokens == "padding_as_zero" else len(at))
        if not len(at):
            return 0.0, count if d.tokens == "padding_as_zero" else 0.0
        return float(self.token_quantity(d, row, step)[at].sum()), count

    def token_quantity(self, d: TokenDefinition, row: Sequence, step: int) -> np.ndarray:
        """By place of the sequence with its padding (see `TokenValues`)."""
        temperature = self._settings.temperature if d.temperature is None else d.temperature
        steps = self.policy_steps(d.policy, step, row)
        values = self._values(steps, d.precision, temperature, row)
        if d.quantity == "entropy":
            return values.entropy
        if d.quantity == "surprisal":
            return -values.logprob
        if d.quantity == "squared":
            return values.logprob**2
        r = self._values(0, d.precision, temperature, row).logprob - values.logprob
        return {"k3": np.exp(r) - r - 1, "k1": -r, "k2": r**2 / 2, "k3_reversed": np.exp(-r) + r - 1}[d.quantity]

    def policy_steps(self, policy: str, step: int, row: Sequence) -> int:
        """Steps that the policy had taken which looks at a sequence in step `step`."""
        if policy == "after":
            return step
        if policy == "stale":
            return step - 2
        if policy == "beginning":
            return 0
        if policy == "generation":
            return self._drawn_at.get((row.prompt_ids, row.completion_ids), step) - 1
        return step - 1

    def _values(self, steps: int, precision: str, temperature: float, row: Sequence) -> TokenValues:
        return self._policies.values(steps, precision, temperature, [row])[0]


def _in_unit(value: float, unit: str) -> float:
    return {"nats": value, "bits": value / math.log(2), "exp": math.exp(min(value, 700.0)), "negated": -value}[unit]


def groups_of(generated: Many[Sequence], settings: RunSettings) -> list[Many[Sequence]]:
    """A round's sequences by prompt, in TRL's order."""
    size = settings.completions_per_prompt
    return [generated[i : i + size] for i in range(0, len(generated), size)]


def total_reward(s: Sequence, settings: RunSettings) -> float:
    """TRL's: the weighted sum over the functions that judge; NaN where none does."""
    rewards = [math.nan if r is None else r for r in (s.rewards or (None,))]
    weights = settings.reward_weights if len(settings.reward_weights) == len(rewards) else [1.0] * len(rewards)
    known = [w * r for w, r in zip(weights, rewards, strict=True) if not math.isnan(r)]
    return sum(known) if known else math.nan


def differs(group: Many[Sequence], settings: RunSettings) -> bool:
    """Whether a group's rewards differ, so that it gives a gradient."""
    known = [r for s in group if not math.isnan(r := total_reward(s, settings))]
    return bool(known) and max(known) - min(known) > 1e-9
