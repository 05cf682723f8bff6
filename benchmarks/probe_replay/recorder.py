"""Records each step of a run token by token, so that estimators of its change of entropy can be replayed as arithmetic.

One file a step, `steps/step-0001.npz`, arrays padded to (N, T): N sequences, T = max_completion_length. A leading `own_` marks
the step's own sequences before filtering, `held_` fresh completions of held-out prompts.

    length, own_prompt (N,)      tokens of each completion; number of its prompt in this step
    own_prompt_key (N,)          of the prompt's tokens, the same in every step: critics' folds are its remainders
    own_log_prior, own_advantage, own_weight (N,)       -log of the chance that drew the prompt; A_i and w_i in the loss
    logprob, entropy, logprob_after, entropy_after      (N, T) before the step and after it, nats
    own_logprob_batch, own_entropy_batch                (N, T) with the batch's part alone (a trial move, restored)
    own_logprob_along, own_entropy_along (N, T, 4)      derivatives along the step's parts, forward mode: along the batch's part,
                                 momentum, decay, and what the sequence's own prompt has in the batch's part
    held_logprob_along, held_entropy_along (M, T, 3)    of the first M held-out sequences, along batch, momentum, decay
    own_collision, own_sharpness, own_variance (N, T)   sum pi^2, sum pi^2 (log pi + H), Var[log pi]: what rivals need
    own_projected (N, T, 64), held_projected (M, T, 64) float16: the last hidden state that predicts the token, projected
    own_share (N, T)             each trained token's share of the batch part's change of h: w_i D log pi(a_k) along P dh, dh
                                 Rao-Blackwell on those M held-out sequences
    lagged_logprob_along, lagged_entropy_along (K, N, T, 2)  of the own sequences of the step k before, at the weights of then,
                                 along today's batch part and the rest: what a running average of gradients predicts today
    held_drawn_score, held_score (M,)  log-probability when drawn, and before this step
    pool_drawn_score, pool_score, pool_prompt_key (N,), pool_* as of `own_`   fresh sequences of distinct held-out prompts,
                                 watched for several steps, an eighth of them replaced in each (pool.py)
    numbers, number_names        scalars: learning rate, clipping, CPU seconds of each kind of pass, checks

The direction that derivatives are taken along is the AdamW step itself (entropy_core.adamw); `numbers` holds the relative
difference between the sum of its parts and the step that was taken.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.probe_replay.pool import POOL_AGE, Pool
from benchmarks.probe_replay.token_passes import completions_from_the_left, stacked, statistics_with_hidden
from entropy_core.adamw import (
    AdamWUpdate,
    after_gradient,
    batch_step_factor,
    preconditioner,
    read_adamw_state,
    split_adamw_update,
)
from entropy_core.batch import SequenceBatch
from entropy_core.critic import prompt_folds
from entropy_core.directional import token_derivatives, weights_moved
from entropy_core.entropy import score_coefficients
from entropy_core.fold_gradients import shared_statistics
from entropy_core.gradients import batch_gradients, dot, entropy_gradient, trainable_parameters
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.passes.shared_prefix import common_prefix_buckets
from entropy_core.processes import Processes
from entropy_core.scores import TokenStatistics
from rl_training.generation.description import describe_sampling
from rl_training.generation.rollout_sequences import to_batch
from rl_training.integrations.trl_rollouts import StepRollouts
from rl_training.sampling import draw
from rl_training.sequences import RolloutSequence

_TIMED_STEPS = 3
DIFFERENTIATED = 64  # held-out sequences of which derivatives and hidden states are kept


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What is recorded of a run.

    held_out: fresh sequences of held-out prompts a step, one of each prompt; redraw_every: steps between two draws (they are
    weighted to the policy in between). lags: of so many earlier steps the sequences are differentiated along today's step.
    derivatives, held_derivatives: whether own and held-out tokens are differentiated. folds: whether each sequence is along its
    own prompt's part of the batch's part. shares: whether the batch's part is attributed to the tokens that it was trained on.
    common_prefix: held-out prompts begin alike and pass that beginning once (for models of which `shares_prefixes` holds).
    pool: sequences that are watched for several steps each.
    """

    held_out: int
    redraw_every: int = 1
    lags: int = 0
    derivatives: bool = True
    folds: bool = True
    held_derivatives: bool = True
    shares: bool = False
    common_prefix: bool = False
    pool: int = 64
    pool_age: int = POOL_AGE


@dataclass
class _Earlier:
    """The own sequences of an earlier step and the weights that drew them."""

    batch: SequenceBatch
    weights: dict[str, Tensor]


@dataclass
class _Step:
    """A step between its two halves."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    own: SequenceBatch | None = None
    before: dict[str, Tensor] = field(default_factory=dict)
    total: dict[str, Tensor] = field(default_factory=dict)


class Recorder(TrainerCallback):
    """Add it to a DrGRPOTrainer before `train()`; training stays what it is, its random streams included."""

    def __init__(self, trainer: Any, heldout: Sequence[dict[str, Any]], settings: RecordSettings, folder: Path) -> None:
        self._trainer, self._settings, self._folder = trainer, settings, folder
        if len(heldout) < settings.held_out:
            raise ValueError(
                f"{settings.held_out} held-out sequences need as many prompts; the task has {len(heldout)}"
            )
        self._heldout = list(heldout)
        self._model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
        self._sampling_config = describe_sampling(trainer).sampling_config()
        self._rollouts = StepRollouts(trainer)
        self._prefixes = PrefixSharing(self._model, Processes())
        self._earlier: deque[_Earlier] = deque(maxlen=max(1, settings.lags))
        self._held: SequenceBatch | None = None
        self._held_statistics: TokenStatistics | None = None
        self._drawn_score = torch.zeros(0)
        pooled = (self._heldout, self._sampling_config, settings.pool, settings.pool_age)
        self._pool = Pool(trainer, self._model, *pooled)
        self._pool_batch: SequenceBatch | None = None
        self._now = _Step()
        (folder / "steps").mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------ the trainer's events
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rollouts.clear()
        self._now = _Step()
        self._begun = time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now.numbers["cpu_step"] = time.process_time() - self._begun
        self._before(kwargs["optimizer"], state.global_step + 1)
        self._begun = time.process_time()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now.numbers["cpu_step"] += time.process_time() - self._begun
        self._after(state.global_step + 1)

    # ------------------------------------------------------------------ before the step
    def _before(self, optimizer: Any, step: int) -> None:
        generated, trained = self._rollouts.take()
        own = to_batch(generated, self._sampling_config)
        self._now.own = own
        self._describe_own(generated, trained, own)
        with self._timed("hidden", len(own)):
            self._keep("own_", own, statistics_with_hidden(self._model, own))
        parameters = trainable_parameters(self._model)
        update = self._split(optimizer, parameters)
        self._now.before = {name: p.detach().clone() for name, p in parameters.items()}
        self._now.total = update.total()
        parts: list[TokenStatistics] = []
        if self._settings.derivatives:
            with self._timed("forward_mode", len(own) * 3):
                parts = self._derivatives(own, [update.batch, update.momentum, update.weight_decay])
        if self._settings.folds:
            parts.append(self._along_own_prompt(optimizer, own))
        elif step <= _TIMED_STEPS:  # what a gradient costs here
            some = own.select(range(min(16, len(own))))
            with self._timed("backward", len(some)):
                self._trained_gradient(some, torch.ones(len(some)))
        if parts:
            self._keep("own_", own, stacked(parts))
        with self._timed("forward", len(own)), weights_moved(self._model, update.batch, 1.0):
            found = self._statistics(own)
        self._keep("own_", own, {"logprob_batch": found.logprobs, "entropy_batch": found.entropies})
        self._lagged(update, own)
        self._held_out(update, step)
        self._watch_pool(step)
        if self._settings.shares:
            self._share(optimizer, own)
        self._earlier.appendleft(_Earlier(own, self._now.before))

    def _describe_own(
        self, generated: list[RolloutSequence], trained: list[RolloutSequence], own: SequenceBatch
    ) -> None:
        loss = {(s.prompt_ids, s.completion_ids): (s.advantage, s.weight) for s in trained}
        pairs = [loss.get((s.prompt_ids, s.completion_ids), (0.0, 0.0)) for s in generated]
        arrays = self._now.arrays
        arrays["own_length"], arrays["own_prompt"] = own.completion_lengths.numpy(), own.prompt_index.numpy()
        arrays["own_prompt_key"] = prompt_folds(own, 2**31).numpy()
        arrays["own_log_prior"] = np.array([s.log_prior for s in generated])
        arrays["own_advantage"], arrays["own_weight"] = np.array(pairs).T
        self._now.numbers["trained_elsewhere"] = float(
            len(loss) - len(loss.keys() & {(s.prompt_ids, s.completion_ids) for s in generated})
        )

    def _split(self, optimizer: Any, parameters: dict[str, nn.Parameter]) -> AdamWUpdate:
        states = read_adamw_state(optimizer, parameters)
        self._now.numbers["learning_rate"] = next(iter(states.values())).lr
        return split_adamw_update(states, {n: p.grad for n, p in parameters.items()}, parameters)

    def _along_own_prompt(self, optimizer: Any, own: SequenceBatch) -> TokenStatistics:
        """Each sequence along its own prompt's part of the batch's part: -lr (1 - b1)/(1 - b1^t) P_t c sum_i w_i dS_i over that
        prompt's sequences, c the clipping."""
        parameters, scale = trainable_parameters(self._model), self._scale(optimizer)
        weights = torch.from_numpy(self._now.arrays["own_weight"])
        rows = [(own.prompt_index == prompt).nonzero()[:, 0] for prompt in own.prompt_index.unique().tolist()]
        with self._timed("backward", len(own)):
            gradients = [self._trained_gradient(own.select(some), weights[some]) for some in rows]
        whole = {name: -torch.stack([g[name] for g in gradients]).sum(0) for name in parameters}
        given = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
        # Without reward differences there is no gradient, and nothing to clip.
        clip = dot(given, whole) / dot(whole, whole) if any(bool(g.any()) for g in whole.values()) else 1.0
        left = {name: given[name] - clip * whole[name] for name in given}
        self._now.numbers["clip"] = clip
        self._now.numbers["fold_residual"] = math.sqrt(dot(left, left) / max(dot(given, given), 1e-30))
        logprobs = torch.zeros(own.input_ids.shape)
        entropies = torch.zeros_like(logprobs)
        for some, gradient in zip(rows, gradients, strict=True):
            direction = {name: scale[name] * clip * g for name, g in gradient.items()}
            if any(bool(d.any()) for d in direction.values()):
                found = token_derivatives(self._model, own.select(some), direction)
                width = found.logprobs.shape[1]
                logprobs[some, :width], entropies[some, :width] = found.logprobs.float(), found.entropies.float()
        return TokenStatistics(logprobs, entropies)

    def _trained_gradient(self, batch: SequenceBatch, weights: Tensor) -> dict[str, Tensor]:
        """sum_i w_i dS_i by the rule of training (torch leaves a padding token's embedding out)."""
        return batch_gradients(self._model, batch, [score_coefficients(batch, weights)], as_trained=True)[0]

    def _scale(self, optimizer: Any) -> dict[str, Tensor]:
        """lr (1 - b1)/(1 - b1^t) P_t of the coming step."""
        parameters, scale = trainable_parameters(self._model), {}
        for name, state in read_adamw_state(optimizer, parameters).items():
            grad = parameters[name].grad
            assert grad is not None
            scale[name] = batch_step_factor(state) * preconditioner(after_gradient(state, grad.detach()))
        return scale

    def _share(self, optimizer: Any, own: SequenceBatch) -> None:
        assert self._held is not None
        some = self._held.select(range(min(len(self._held), DIFFERENTIATED)))
        gradient = entropy_gradient(self._model, some, "rao_blackwell", per_token=True)
        scale, clip = self._scale(optimizer), self._now.numbers["clip"]
        along = token_derivatives(self._model, own, {name: clip * scale[name] * g for name, g in gradient.items()})
        weights = torch.from_numpy(self._now.arrays["own_weight"])
        self._keep("own_", own, {"share": weights[:, None] * along.logprobs})

    def _lagged(self, update: AdamWUpdate, own: SequenceBatch) -> None:
        lags, longest = self._settings.lags, self._sampling_config.max_completion_length
        if not lags:
            return
        rest = {name: update.momentum[name] + update.weight_decay[name] for name in update.momentum}
        shape = (
            lags,
            max(len(own), *(len(e.batch) for e in self._earlier), 0) if self._earlier else len(own),
            longest,
            2,
        )
        found = {name: np.full(shape, np.nan, np.float32) for name in ("logprob", "entropy")}
        for k, earlier in enumerate(self._earlier):
            with self._weights(earlier.weights):
                for place, direction in enumerate((update.batch, rest)):
                    along = token_derivatives(self._model, earlier.batch, direction)
                    found["logprob"][k, : len(earlier.batch), :, place] = self._completions(
                        earlier.batch, along.logprobs
                    )
                    found["entropy"][k, : len(earlier.batch), :, place] = self._completions(
                        earlier.batch, along.entropies
                    )
        self._now.arrays |= {f"lagged_{name}_along": values for name, values in found.items()}

    def _held_out(self, update: AdamWUpdate, step: int) -> None:
        if self._held is None or (step - 1) % self._settings.redraw_every == 0:
            rng = np.random.default_rng((self._trainer.args.seed, step, 5))
            rows = [self._heldout[i] for i in rng.permutation(len(self._heldout))[: self._settings.held_out]]
            with self._timed("draw", len(rows)):
                drawn = draw(
                    self._model,
                    self._trainer.processing_class,
                    rows,
                    1,
                    self._sampling_config,
                    7919 + step,
                    "",
                )
            self._held = drawn.to_batch(self._sampling_config)
            self._held_statistics = self._of_held_out(self._held)
            self._drawn_score = self._held_statistics.scores()
        held, before = self._held, self._held_statistics
        assert before is not None
        self._now.arrays["held_length"] = held.completion_lengths.numpy()
        self._now.arrays["held_drawn_score"], self._now.arrays["held_score"] = (
            self._drawn_score.numpy(),
            before.scores().numpy(),
        )
        self._keep("held_", held, {"logprob": before.logprobs, "entropy": before.entropies})
        if self._settings.held_derivatives:
            first = held.select(range(min(len(held), DIFFERENTIATED)))
            found = self._derivatives(first, [update.batch, update.momentum, update.weight_decay])
            self._keep("held_", first, stacked(found))
            self._keep("held_", first, {"projected": statistics_with_hidden(self._model, first)["projected"]})

    def _watch_pool(self, step: int) -> None:
        batch, drawn_scores = self._pool.turn(step)
        self._pool_batch = batch
        values = statistics_with_hidden(self._model, batch)
        self._keep("pool_", batch, {name: values[name] for name in ("logprob", "entropy", "projected")})
        self._now.numbers["pool_age"] = float(self._settings.pool_age)
        self._now.arrays["pool_length"] = batch.completion_lengths.numpy()
        self._now.arrays["pool_prompt_key"] = prompt_folds(batch, 2**31).numpy()
        self._now.arrays["pool_drawn_score"] = np.array(drawn_scores)
        self._now.arrays["pool_score"] = values["logprob"].sum(1).numpy()

    # ------------------------------------------------------------------ after it
    def _after(self, step: int) -> None:
        own, held, pool = self._now.own, self._held, self._pool_batch
        assert own is not None and held is not None and pool is not None
        parameters = trainable_parameters(self._model)
        taken = {name: parameters[name].detach() - start for name, start in self._now.before.items()}
        left = {name: taken[name] - part for name, part in self._now.total.items()}
        self._now.numbers["step_residual"] = math.sqrt(dot(left, left) / dot(taken, taken))
        found = self._statistics(own)
        self._keep("own_", own, {"logprob_after": found.logprobs, "entropy_after": found.entropies})
        found = self._of_held_out(pool)
        self._keep("pool_", pool, {"logprob_after": found.logprobs, "entropy_after": found.entropies})
        found = self._of_held_out(held)
        self._keep("held_", held, {"logprob_after": found.logprobs, "entropy_after": found.entropies})
        self._held_statistics = found
        self._write(step)

    def _write(self, step: int) -> None:
        names = sorted(self._now.numbers)
        self._now.arrays["number_names"] = np.array(names)
        self._now.arrays["numbers"] = np.array([self._now.numbers[name] for name in names])
        path = self._folder / "steps" / f"step-{step:04d}.npz"
        part = path.with_suffix(".part")
        with part.open("wb") as handle:
            np.savez(handle, **self._now.arrays)  # pyright: ignore[reportArgumentType]
        part.replace(path)

    # ------------------------------------------------------------------ passes
    def _statistics(self, batch: SequenceBatch) -> TokenStatistics:
        return shared_statistics(self._model, batch, self._prefixes.buckets(batch), Processes())

    def _of_held_out(self, batch: SequenceBatch) -> TokenStatistics:
        if not self._settings.common_prefix:
            return self._statistics(batch)
        return shared_statistics(
            self._model, batch, lambda b: common_prefix_buckets(b, tokens_per_row=256), Processes()
        )

    # ------------------------------------------------------------------ keeping
    def _keep(self, prefix: str, batch: SequenceBatch, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            kept = self._completions(batch, value)
            self._now.arrays[prefix + name] = kept.astype(np.float16) if name == "projected" else kept

    def _derivatives(self, batch: SequenceBatch, directions: Sequence[Mapping[str, Tensor]]) -> list[TokenStatistics]:
        """Along each direction; a direction that is nothing (no decay, no momentum yet) takes no pass."""
        nothing = TokenStatistics(*(torch.zeros(batch.input_ids.shape) for _ in range(2)))
        return [
            token_derivatives(self._model, batch, d) if any(bool(x.any()) for x in d.values()) else nothing
            for d in directions
        ]

    def _completions(self, batch: SequenceBatch, values: Tensor) -> np.ndarray:
        return completions_from_the_left(batch, values, self._sampling_config.max_completion_length)

    @contextmanager
    def _weights(self, weights: dict[str, Tensor]) -> Iterator[None]:
        parameters = trainable_parameters(self._model)
        now = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(weights[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(now[name])

    @contextmanager
    def _timed(self, kind: str, sequences: int) -> Iterator[None]:
        """CPU seconds of one pass of this kind a sequence, in `numbers`."""
        started = time.process_time()
        yield
        self._now.numbers[f"cpu_{kind}_per_sequence"] = (time.process_time() - started) / sequences
