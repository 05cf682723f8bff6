"""What a forecast of an analysis is measured on: a few sequences drawn from the checkpoint, passed,
and timed.

    drawing n completions       prompts * (seconds of a forward pass) + steps * (a + b n),    steps = the longest of them
    passing n sequences         n * (forward + backward passes * backward)

a, b come from two drawings of different size; the longest of n completions from the lengths that
the run recorded. The training side is passed as groups that share their prompts, the evaluation
side as it will be drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.directional import token_derivatives
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.gradients import batch_gradients, stream_rows, trainable_parameters
from entropy_core.passes.forward import evaluation_mode, input_device
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.row_formation import RowFormation
from entropy_core.passes.settings import PassSettings
from entropy_core.scores import token_statistics
from entropy_experiments.buffers.sampling_plan import SamplingPlan
from entropy_experiments.buffers.saved import refuse_drawing, refuse_foreign
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import (
    choose_evaluation_rows,
    given_buffers,
    sample_evaluation_batch,
    sample_training_batch,
)
from entropy_experiments.kernel.modules import chosen_parameters, only_trainable
from entropy_experiments.step.row_products import rows_are_large
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts
from rl_training.sampling import Rollouts, draw
from rl_training.sequences import RolloutSequence

PILOT = 16  # sequences a side
_PASSED = 64  # at most, where passes without gradients are timed: these go in larger batches
_SLOW = 2.0  # seconds of a forward pass over the pilot: larger batches would tell nothing more
_FEW = 4  # of the smaller drawing
_RECORDED_STEPS = 4  # whose lengths and rejected groups are looked at
_DRAWN_AT_A_TIME = 64  # as in rl_training.sampling


@dataclass(frozen=True)
class PassRates:
    """Seconds a sequence of one side takes: forward without and with a graph, each backward pass,
    and a pass in forward mode (values and derivatives at once); tokens: its length.
    """

    forward: float
    with_graph: float
    backward: float
    derivatives: float
    tokens: float

    def scaled(self, tokens: float) -> PassRates:
        """For sequences of another mean length."""
        ratio = tokens / self.tokens
        rates = (self.forward, self.with_graph, self.backward, self.derivatives)
        return PassRates(*(rate * ratio for rate in rates), tokens)

    def seconds(self, sequences: float, backwards: int) -> float:
        forward = self.with_graph if backwards else self.forward
        return sequences * (forward + backwards * self.backward)


@dataclass(frozen=True)
class DrawingRates:
    """What drawing completions takes, from a few drawings.

    Attributes:
        prefill: seconds of a prompt.
        fixed, each: of a step, and of a sequence in a step.
        lengths: of completions, recorded.
    """

    prefill: float
    fixed: float
    each: float
    lengths: Sequence[int]

    def seconds(self, sequences: float) -> float:
        """Of drawing so many completions in one call."""
        whole, rest = divmod(sequences, _DRAWN_AT_A_TIME)
        one = self._one_batch
        return whole * one(_DRAWN_AT_A_TIME) + (one(rest) if rest >= 1 else 0.0)

    def _one_batch(self, n: float) -> float:
        return n * self.prefill + self._expected_longest(n) * (self.fixed + n * self.each)

    def _expected_longest(self, n: float) -> float:
        """E[max of n lengths] = sum over lengths of the chance that one of n is at least as long."""
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        steps = torch.arange(1, int(lengths.max()) + 1, dtype=torch.float64)
        shorter = (lengths[None, :] < steps[:, None]).double().mean(1)
        return float((1 - shorter**n).sum())


@dataclass(frozen=True)
class Pilot:
    """What a few timed passes and drawings tell of an analysis.

    Attributes:
        kept: share of the completions generated whose groups were kept.
        pass_bytes: of a token in a pass with its graph.
        rows: how gradient rows were formed.
    """

    training: PassRates
    evaluation: PassRates
    drawing: DrawingRates
    kept: float
    pass_bytes: float
    rows: RowFormation


@dataclass(frozen=True)
class GivenBuffers:
    """Sides that are not drawn: sequences that the user gives, reference completions, the run's own buffer. None: drawn."""

    evaluation: Rollouts | None
    training: Rollouts | None


def buffers_without_drawing(checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig) -> GivenBuffers:
    """As the analysis will have them. Raises UserError as it would."""
    sampling = config.entropy_analysis.sampling
    refuse_drawing(checkpoint, sampling)
    evaluation, training, _ = given_buffers(checkpoint, plan, config)
    if evaluation is None and sampling.eval_completions == "reference" and not sampling.same_prompts:
        evaluation = sample_evaluation_batch(checkpoint, plan, config, choose_evaluation_rows(plan, config))
    if training is None and (sampling.train_prompts == "from_run" or sampling.train_completions == "reference"):
        training = sample_training_batch(checkpoint, plan, config, [])
    if training is not None:
        refuse_foreign(training.rollouts, sampling)
    return GivenBuffers(evaluation, None if training is None else training.rollouts)


def run_pilot(checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, given: GivenBuffers) -> Pilot:
    """Draw and time it. The model is left as it was."""
    model, each = checkpoint.model, config.entropy_analysis.sampling.eval_completions_per_prompt
    group = min(plan.completions_per_prompt, PILOT)
    pool = given.evaluation.prompt_row if given.evaluation else choose_evaluation_rows(plan, config)
    pool = pool or (given.training.prompt_row if given.training else plan.task.train)
    drawings: list[tuple[float, Rollouts]] = []

    def drawn(rows: Sequence[dict[str, Any]], prompts: int, completions: int) -> Rollouts:
        chosen, seed = [rows[i % len(rows)] for i in range(prompts)], config.seed + 7 + len(drawings)
        arguments = (model, checkpoint.tokenizer, chosen, completions, plan.sampling_config, seed, "pilot")
        drawings.append(_timed(lambda: draw(*arguments)))
        return drawings[-1][1]

    drawn(pool, _FEW, 1)
    evaluation = _first(given.evaluation) or drawn(pool, -(-PILOT // each), each)
    training = _first(given.training) or drawn(plan.task.train, max(1, PILOT // group), group)
    if len(drawings) == 1:
        drawn(pool, PILOT, 1)
    settings = config.entropy_analysis
    formation = RowFormation(settings.fisher_kernel.method, announce=lambda line: None)
    timed = [
        _time_passes(
            model, side.to_batch(plan.sampling_config).to(input_device(model)), min(count, _PASSED), config, formation
        )
        for side, count in ((evaluation, settings.eval_batch_size), (training, settings.train_batch_size))
    ]
    recorded = _recorded(checkpoint)
    lengths = [len(c) for _, rollouts in drawings for c in rollouts.completion_ids]
    recorded_lengths = [len(s.completion_ids) for s in recorded if s.completion_ids]
    longer = _mean(recorded_lengths or lengths) - _mean(lengths)
    rates = [
        passes if known else passes.scaled(max(passes.tokens + longer, 1.0))
        for (passes, _), known in zip(timed, (given.evaluation, given.training), strict=True)
    ]
    kept = sum(s.status == "trained" for s in recorded)
    return Pilot(
        rates[1],
        rates[0],
        _drawing_rates(drawings, rates[0], recorded_lengths or lengths),
        kept / len(recorded) if kept else 1.0,
        max(kept_bytes for _, kept_bytes in timed),
        formation,
    )


def _first(rollouts: Rollouts | None) -> Rollouts | None:
    return rollouts and rollouts[:PILOT]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _recorded(checkpoint: Checkpoint) -> list[RolloutSequence]:
    """Of the run's last steps up to the checkpoint; none where it recorded none."""
    found, last = [], checkpoint.record.step
    for step in range(max(1, last - _RECORDED_STEPS + 1), last + 1):
        try:
            found += read_rollouts(checkpoint.record.run_dir, step)
        except UserError:  # this step was not recorded
            continue
    return found


def _drawing_rates(
    drawings: Sequence[tuple[float, Rollouts]], passes: PassRates, lengths: Sequence[int]
) -> DrawingRates:
    """a, b of the smallest drawing and of the mean of the larger ones."""
    per_token = passes.forward / passes.tokens

    def a_step(seconds: float, rollouts: Rollouts) -> tuple[int, float]:
        prompts = sum(len(p) for p in rollouts.prompt_ids)
        longest = max(1, max(len(c) for c in rollouts.completion_ids))
        return len(rollouts), max(seconds - per_token * prompts, 0.1 * seconds) / longest

    (few, small), *more = (a_step(*drawing) for drawing in drawings)
    many, large = (sum(values) / len(more) for values in zip(*more, strict=True))
    each = max((large - small) / (many - few), 0.0) if many > few else 0.0
    prompt = _mean([len(p) for _, rollouts in drawings for p in rollouts.prompt_ids])
    return DrawingRates(per_token * prompt, max(large - many * each, 0.0), each, lengths)


def more_of_the_kind(batch: SequenceBatch, count: int) -> SequenceBatch:
    """At least as many sequences as `count`, right-padded: the batch's, then copies of their
    lengths, groups and common beginning with other tokens, so that they share in a pass what so
    many sequences would.
    """
    n, copies = len(batch), max(1, -(-count // len(batch)))
    first, prompts = batch.prompt_index.unique(return_inverse=True)
    prompt = batch.prompt_mask
    common = (prompt & (batch.input_ids == batch.input_ids[0])).all(0).long().cumprod(0).bool()
    legal = batch.input_ids[batch.attention_mask]
    generator = torch.Generator().manual_seed(0)

    def others(rows: int) -> Tensor:
        places = torch.randint(0, len(legal), (rows, batch.input_ids.shape[1]), generator=generator)
        return legal[places.to(legal.device)]

    ids = [batch.input_ids]
    for _ in range(copies - 1):
        drawn = torch.where(prompt, others(len(first))[prompts], others(n))
        ids.append(torch.where(batch.attention_mask & ~common, drawn, batch.input_ids))
    return replace(
        batch,
        input_ids=torch.cat(ids),
        attention_mask=batch.attention_mask.repeat(copies, 1),
        completion_mask=batch.completion_mask.repeat(copies, 1),
        prompt_index=torch.cat([prompts + number * len(first) for number in range(copies)]),
    )


def _time_passes(
    model: torch.nn.Module, batch: SequenceBatch, count: int, config: FisherAnalysisConfig, formation: RowFormation
) -> tuple[PassRates, float]:
    """Rates of one side of `count` sequences, and bytes of a token of a pass."""
    settings = config.entropy_analysis.fisher_kernel
    names, passes = (
        chosen_parameters(model, settings.filter_modules),
        PassSettings(settings.token_batch_size, formation),
    )
    # first calls are slower, and run in memory that is not there yet
    warm, statistics = _timed(lambda: token_statistics(model, batch, passes))
    many = batch if warm > _SLOW else more_of_the_kind(batch, count)
    if many is not batch:
        token_statistics(model, many, passes)
    forward, _ = _timed(lambda: token_statistics(model, many, passes))
    large, one = rows_are_large(model), [score_coefficients(batch)]
    four = [*one, entropy_coefficients(statistics, batch, "rao_blackwell")] * (1 if large else 2)

    def rows_of(objectives: list[Any]) -> None:
        if not settings.compute_full:
            batch_gradients(model, batch, objectives, passes)
            return
        with only_trainable(model, names):
            stream_rows(model, batch, objectives, lambda *_: None, passes, lambda: None, factored=large)

    with torch.enable_grad(), evaluation_mode(model), _kept_for_backward(model) as kept:
        bucket = max(length_buckets(batch, passes.token_batch_size, fewest=False), key=lambda b: b.input_ids.numel())
        graph = completion_values(model, bucket, batch.temperature)
        del graph
    rows_of(one)  # checks rows, or finds out that hooks will not do
    single, _ = _timed(lambda: rows_of(one))
    several, _ = _timed(lambda: rows_of(four))
    direction = {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}
    derivatives, _ = _timed(lambda: token_derivatives(model, many, direction, passes))
    n, tokens, more = len(batch), int(batch.attention_mask.sum()), len(many) / len(batch)
    forward, derivatives = forward / more, derivatives / more
    backward = max((several - single) / (len(four) - 1), 0.2 * forward)
    rates = PassRates(forward / n, max(forward, single - backward) / n, backward / n, derivatives / n, tokens / n)
    return rates, sum(kept.values()) / int(batch.attention_mask[bucket.indices].sum())


@contextmanager
def _kept_for_backward(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Yields what graphs made inside keep beside the model's own tensors: address -> bytes of each
    storage.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    with torch.enable_grad():
        found = work()
    return time.perf_counter() - begun, found
