"""What a forecast of an analysis is measured on: a few sequences drawn from the checkpoint, passed, and timed.

    drawing n completions       prompts * (seconds of a forward pass) + steps * (a + b n),    steps = the longest of them
    passing n sequences         n * (forward + backward passes * backward)

a, b come from two drawings of different size; the longest of n completions from the lengths that the run recorded. The
training side is passed as groups that share their prompts, the evaluation side as it will be drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.directional import token_derivatives
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.forward import evaluation_mode, input_device
from entropy_core.gradients import stream_rows, trainable_parameters
from entropy_core.output_head import completion_values
from entropy_core.scores import token_statistics
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.double_sampling import choose_evaluation_rows
from entropy_experiments.module_filter import chosen_parameters, only_trainable
from entropy_experiments.sampling_plan import SamplingPlan
from rl_training.algs.rollout_record import read_rollouts
from rl_training.errors import UserError
from rl_training.sampling import draw

PILOT = 16  # sequences a side
_FEW = 4  # of the smaller drawing
_RECORDED_STEPS = 4  # whose lengths and rejected groups are looked at
_DRAWN_AT_A_TIME = 64  # as in rl_training.sampling


@dataclass(frozen=True)
class PassRates:
    """Seconds a sequence of one side takes: forward without and with a graph, each backward pass, and a pass in forward mode
    (values and derivatives at once); tokens: its length.
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
    """prefill: seconds of a prompt; fixed, each: of a step, and of a sequence in a step; lengths: of completions, recorded."""

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
    """kept: share of the completions generated whose groups were kept. pass_bytes: of a token in a pass with its graph."""

    training: PassRates
    evaluation: PassRates
    drawing: DrawingRates
    kept: float
    pass_bytes: float


def run_pilot(checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig) -> Pilot:
    """Draw and time it. The model is left as it was."""
    settings, model = config.entropy_analysis, checkpoint.model
    recorded = _recorded_rows(checkpoint)
    groups = max(1, PILOT // plan.completions_per_prompt)
    each = settings.sampling.eval_completions_per_prompt
    pool = choose_evaluation_rows(plan, config) or plan.task.train
    shapes = [
        (_some(plan.task.train, groups), min(plan.completions_per_prompt, PILOT)),
        (_some(pool, -(-PILOT // each)), each),
    ]
    seed = config.seed + 7
    few_seconds, few = _timed(lambda: draw(model, checkpoint.tokenizer, _some(pool, _FEW), 1, plan.law, seed, "pilot"))
    passes, drawings, bytes_of_a_token = [], [(few_seconds, few)], 0.0
    for number, (rows, completions) in enumerate(shapes):
        seconds, rollouts = _timed(
            lambda rows=rows, completions=completions, number=number: draw(
                model, checkpoint.tokenizer, rows, completions, plan.law, seed + 1 + number, "pilot"
            )
        )
        drawings.append((seconds, rollouts))
        batch = rollouts.to_batch(plan.law).to(input_device(model))
        rates, taken = _time_passes(model, batch, config)
        passes.append(rates)
        bytes_of_a_token = max(bytes_of_a_token, taken)
    lengths = [len(c) for _, rollouts in drawings for c in rollouts.completion_ids]
    recorded_lengths = [len(row["completion_ids"]) for row in recorded if row["completion_ids"]]
    longer = _mean(recorded_lengths or lengths) - _mean(lengths)
    training, evaluation = (rates.scaled(max(rates.tokens + longer, 1.0)) for rates in passes)
    kept = sum(row["status"] == "trained" for row in recorded)
    return Pilot(
        training,
        evaluation,
        _drawing_rates(drawings, passes[1], recorded_lengths or lengths),
        kept / len(recorded) if kept else 1.0,
        bytes_of_a_token,
    )


def _some(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [rows[i % len(rows)] for i in range(count)]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _recorded_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Of the run's last steps up to the checkpoint; none where it recorded none."""
    found, last = [], checkpoint.record.step
    for step in range(max(1, last - _RECORDED_STEPS + 1), last + 1):
        try:
            found += read_rollouts(checkpoint.record.run_dir, step)
        except UserError:  # this step was not recorded
            continue
    return found


def _drawing_rates(drawings: Sequence[tuple[float, Any]], passes: PassRates, lengths: Sequence[int]) -> DrawingRates:
    """a, b of the smallest drawing and of the mean of the larger ones."""
    per_token = passes.forward / passes.tokens

    def a_step(seconds: float, rollouts: Any) -> tuple[int, float]:
        prompts = sum(len(p) for p in rollouts.prompt_ids)
        longest = max(1, max(len(c) for c in rollouts.completion_ids))
        return len(rollouts), max(seconds - per_token * prompts, 0.1 * seconds) / longest

    (few, small), *more = (a_step(*drawing) for drawing in drawings)
    many, large = (sum(values) / len(more) for values in zip(*more, strict=True))
    each = max((large - small) / (many - few), 0.0) if many > few else 0.0
    prompt = _mean([len(p) for _, rollouts in drawings for p in rollouts.prompt_ids])
    return DrawingRates(per_token * prompt, max(large - many * each, 0.0), each, lengths)


def _time_passes(model: torch.nn.Module, batch: SequenceBatch, config: FisherAnalysisConfig) -> tuple[PassRates, float]:
    """Rates of one side, and bytes of a token of a pass."""
    settings = config.entropy_analysis.fisher_kernel
    names, token_batch_size = chosen_parameters(model, settings.filter_modules), settings.token_batch_size
    token_statistics(model, batch.select([0]), token_batch_size)  # first calls are slower
    forward, statistics = _timed(lambda: token_statistics(model, batch, token_batch_size))
    one = [score_coefficients(batch)]
    four = [*one, entropy_coefficients(statistics, batch, "rao_blackwell")] * 2

    def rows_of(objectives: list[Any]) -> None:
        with only_trainable(model, names):
            stream_rows(model, batch, objectives, lambda *_: None, token_batch_size, verify=False)

    with torch.enable_grad(), evaluation_mode(model), _kept_for_backward(model) as kept:
        bucket = max(length_buckets(batch, token_batch_size), key=lambda b: b.input_ids.numel())
        graph = completion_values(model, bucket, batch.temperature)
        del graph
    single, _ = _timed(lambda: rows_of(one))
    several, _ = _timed(lambda: rows_of(four))
    direction = {name: torch.ones_like(p) for name, p in trainable_parameters(model).items()}
    derivatives, _ = _timed(lambda: token_derivatives(model, batch, direction, token_batch_size))
    backward = max((several - single) / (len(four) - 1), 0.2 * forward)
    n, tokens = len(batch), int(batch.attention_mask.sum())
    rates = PassRates(forward / n, max(forward, single - backward) / n, backward / n, derivatives / n, tokens / n)
    return rates, sum(kept.values()) / int(batch.attention_mask[bucket.indices].sum())


@contextmanager
def _kept_for_backward(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Yields what graphs made inside keep beside the model's own tensors: address -> bytes of each storage."""
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
