"""The entropy controller inside a GRPOTrainer: it changes training, so it is attached by name or by `entropy_controller.enabled`.

The trainer's own forward pass gives the bonus's entropies, held-out sequences of a pool the level and its gradient, and the bonus
is added just before clipping, as if it had stood in the loss all along.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_core.processes import Processes
from rl_training.control.controller import ControlledStep, EntropyController, StepToCome
from rl_training.controller_config import EntropyControllerConfig
from rl_training.errors import UserError
from rl_training.generation.description import SettledSampling, describe_sampling
from rl_training.generation.drawn_tokens import environment_of
from rl_training.generation.rollout_sequences import to_batch
from rl_training.integrations.fresh_prompts import FreshCompletions
from rl_training.integrations.sequence_pool import SequencePool
from rl_training.integrations.watched_source import held_out_prompts
from rl_training.premises.full_precision import without_autocast
from rl_training.premises.gradient_premise import is_sharded
from rl_training.premises.loss_reading import LossReader, LossReading
from rl_training.premises.sampling_check import FirstPrompts, SamplingWatcher
from rl_training.premises.step_as_solved import StepAsSolved
from rl_training.probe.step_parts import moved_unseen, why_not_split

STATE_KEY = "entropy_controller"

_REWARD_GRADIENT = {
    "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "num_iterations": 1, "importance_sampling_level": "token",
    "length_normalizer": "constant", "mask_truncated_completions": False, "delta": None, "off_policy_mask_threshold": None,
    "multi_objective_aggregation": "sum_then_normalize", "max_refill_rounds": 0, "difficulty_weighting": False,
}  # fmt: skip
"""Arguments, where the trainer has them, with which the loss's gradient is that of mean reward up to a factor."""


def attach_entropy_controller(
    trainer: Any,
    target: float | None = None,
    config: EntropyControllerConfig | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    console: bool = True,
) -> EntropyControllerCallback:
    """Hold the entropy of a GRPOTrainer's policy at a target. **This changes training.** Call it before `trainer.train()`.

    Logs `entropy_controller/...` at every step: the coefficient, what was predicted without the bonus and with it, the target,
    and what the bonus cost in predicted reward where that is known.

    Args:
        trainer: a GRPOTrainer of TRL in one process, with AdamW.
        target: nats per token; in place of `config.target`.
        config: further settings; None for the defaults.
        rows: held-out prompts; by default those of the trainer's evaluation set, or else of its training set.
        console: say on standard error that training is changed.

    Raises:
        UserError: a trainer whose step cannot be solved for; the line says why and what to set.
    """
    settings = (config or EntropyControllerConfig()).model_dump() | {"enabled": True}
    settings |= {} if target is None else {"target": float(target)}
    config = EntropyControllerConfig(**settings)
    if (why := why_not_controlled(trainer)) is not None:
        raise UserError(f"the entropy controller: {why}")
    callback = EntropyControllerCallback(trainer, config, held_out_prompts(trainer, rows))
    SamplingWatcher.attach(trainer, describe_sampling(trainer), "entropy controller")
    trainer.add_callback(callback)
    if console:
        tqdm.write(callback.describe(), file=sys.stderr)
    return callback


def why_not_controlled(trainer: Any) -> str | None:
    """Why a bonus cannot be solved for in this trainer, with the remedy; None where it can."""
    args, accelerator = trainer.args, trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    coarse = {str(p.dtype) for p in model.parameters() if p.requires_grad} - {"torch.float32", "torch.float64"}
    if (argument := environment_of(trainer)) is not None:
        return f"{argument} writes into completions, and held-out ones cannot be drawn: train without it"
    if accelerator.num_processes > 1 or is_sharded(trainer):
        return "several processes are not supported: train in one"
    if str(accelerator.mixed_precision) == "fp16":
        return "fp16 scales the gradient and may skip steps: use bf16=True, or full precision"
    if coarse:
        return f"trained weights in {min(coarse).removeprefix('torch.')} round most of a step away: load the model in float32"
    if getattr(args, "use_liger_kernel", False):
        return "use_liger_kernel=True computes a loss without token entropies: set it to False"
    if getattr(trainer, "use_adaptive_entropy", False) or getattr(trainer, "entropy_coef", 0.0):
        return "the trainer has an entropy bonus of its own: set entropy_coef=0 and use_adaptive_entropy=False"
    if getattr(args, "top_entropy_quantile", 1.0) < 1.0:
        return "top_entropy_quantile masks tokens of the bonus as well: set it to 1"
    if LossReader.of(trainer) is None:
        return "the trainer has no forward pass that gives token entropies: use TRL's GRPOTrainer"
    if trainer.optimizer is not None:
        return _why_not_this_optimizer(model, trainer.optimizer)
    return None


def _why_not_this_optimizer(model: torch.nn.Module, optimizer: Any) -> str | None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    why = why_not_split(parameters, optimizer)
    return None if why is None else f"{why}; only steps of torch's AdamW can be solved for: set optim=adamw_torch"


class EntropyControllerCallback(TrainerCallback):
    """See `attach_entropy_controller`.

    Attributes:
        history: what was done at each step of this process.
        seconds: what it cost, a number a step.
    """

    def __init__(self, trainer: Any, config: EntropyControllerConfig, prompts: list[dict[str, Any]]) -> None:
        self._trainer, self._config = trainer, config
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._controller = EntropyController(config, self._model)
        description = describe_sampling(trainer)
        self._sampling_config, self._settled = description.sampling_config(), SettledSampling(trainer)
        self._first_prompts = FirstPrompts(trainer, description)
        self._taken, self._told = StepAsSolved(self._model, self._tell), set[str]()
        fresh = FreshCompletions(trainer, self._model, self._sampling_config, Processes())
        self._pool = SequencePool(prompts, config.eval_sequences, config.pool_age, fresh.draw)
        self._acted, self._spent, self._seed, self._step, self._last = True, 0.0, 0, 0, 1
        self._record: dict[str, Any] = {}
        self.history: list[ControlledStep] = []
        self.seconds: list[float] = []
        reader = LossReader.of(trainer)
        assert reader is not None
        reader.after_forward.append(self._take_entropies)
        self._reader = reader
        self._clip = trainer.accelerator.clip_grad_norm_
        trainer.accelerator.clip_grad_norm_ = self._before_clipping
        trainer.entropy_controller = self.describe()

    def describe(self) -> str:
        """One line: that training is changed, and how."""
        c = self._config
        held = "the entropy of the first step" if c.target is None else f"{c.target:g} nats per token"
        path = "" if c.schedule == "constant" else f", {c.schedule.replace('_', ' ')} to {c.final_target:g}"
        cost = "logged" if self._reward_scale() is not None else "not known for this loss"
        return (
            f"entropy controller: THIS CHANGES TRAINING. An entropy bonus of {c.alpha_min:g} to {c.alpha_max:g} is added to "
            f"every step's gradient, solved to hold {held}{path}; its cost in predicted reward: {cost}"
        )

    # ------------------------------------------------------------------ the trainer's events
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (why := _why_not_this_optimizer(self._model, kwargs["optimizer"])) is not None:
            raise UserError(f"the entropy controller: {why}")
        self._settled.begin()
        self._taken.watch(kwargs["optimizer"])
        self._pool.clear()
        found, self._record = state.stateful_callbacks.get(STATE_KEY), {}
        if isinstance(found, Mapping) and found.get("step") == state.global_step:
            self._load(dict(found))
        elif state.global_step > 0:
            warnings.warn(
                "the entropy controller: the checkpoint holds no state of it at this step; level, bias and target begin anew",
                RuntimeWarning,
                stacklevel=2,
            )
        state.stateful_callbacks[STATE_KEY] = self._record

    def _load(self, found: dict[str, Any]) -> None:
        try:
            self._controller.load(found["controller"])
            self._pool.load(found["pool"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint's state of the entropy controller is damaged ({error}): go on from another checkpoint, or "
                "without the controller"
            ) from error
        self._record = found

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._settled.hold(state.global_step + 1)
        self._controller.begin_step()
        self._acted, self._spent = False, 0.0
        self._seed, self._step, self._last = int(args.seed), int(state.global_step), int(state.max_steps)

    def _take_entropies(self, reading: LossReading, entropies: Tensor | None) -> None:
        """The trainer's forward pass has given the (n, L) entropies of a micro-batch, with their graph."""
        if self._acted or entropies is None or not entropies.requires_grad:
            return
        begun = time.perf_counter()
        mask = reading.completion_mask.to(entropies)
        accumulated = int(getattr(self._trainer, "current_gradient_accumulation_steps", 1))
        self._controller.add_bonus((entropies * mask).sum() / mask.sum().clamp(min=1.0) / accumulated)
        self._spent += time.perf_counter() - begun

    def _before_clipping(self, parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        if self._acted:
            return self._clip(parameters, max_norm, *args, **kwargs)
        self._acted = True
        begun = time.perf_counter()
        with without_autocast(self._model):
            self._act(float(max_norm))
        self._spent += time.perf_counter() - begun
        self._log()
        norm = self._clip(parameters, max_norm, *args, **kwargs)
        self._taken.note(self._trainer.optimizer)
        return norm

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._acted:
            raise UserError(
                "the entropy controller: the trainer took a step without asking accelerate for the gradient's norm, so nothing "
                "could be added before clipping: use TRL's GRPOTrainer with max_grad_norm"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._taken.end()

    # ------------------------------------------------------------------ the step
    def _act(self, max_norm: float) -> None:
        self._first_prompts.require_ours()
        self._controller.target.note_reward(self._step, self._reward())
        rng = np.random.default_rng((self._seed, self._step, 0, 0, 2))  # a stream that nothing else has
        sequences = self._pool.turn(self._step, rng)
        batch = to_batch(sequences, self._sampling_config).to(self._trainer.accelerator.device)
        coming = StepToCome(self._step, self._last, max_norm, self._reward_scale())
        if (word := moved_unseen(self._model, self._trainer.optimizer)) is not None:
            self._tell(word)
        done = self._controller.act(self._trainer.optimizer, coming, batch, self._pool.scored)
        if done.alpha != 0.0:
            for changed in self._reader.after_addition:
                changed()
        self.history.append(done)
        self._record.update(step=self._step + 1, controller=self._controller.state(), pool=self._pool.state())

    def _log(self) -> None:
        done, logged = self.history[-1], self._trainer._metrics["train"]
        self.seconds.append(self._spent)
        values = {
            "alpha": done.alpha,
            "target": done.target,
            "entropy": done.entropy,
            "entropy_se": done.standard_error,
            "level": done.level,
            "bias": done.bias,
            "predicted_without": done.without,
            "predicted": done.predicted,
            "planned": done.planned,
            "saturated": float(done.saturated),
            "seconds": self._spent,
        }
        if not math.isnan(done.reward):
            values["reward_change"] = done.reward
        for name, value in values.items():
            logged[f"entropy_controller/{name}"].append(value)

    def _tell(self, sentence: str) -> None:
        if not self._told:  # once: the figure in it is another one at every step
            self._told.add(sentence)
            warnings.warn(f"the entropy controller: {sentence}", RuntimeWarning, stacklevel=2)

    def _reward(self) -> float | None:
        """Mean reward of the step's completions, as far as the trainer has logged it."""
        metrics = self._trainer._metrics["train"]
        for name in ("buffer/reward_first_round", "reward"):
            if metrics.get(name):
                return float(metrics[name][-1])
        return None

    def _reward_scale(self) -> float | None:
        """Of Dr. GRPO's loss alone: -g = sum_i A_i grad S_i / (N L), and grad J is G / (G - 1) times its mean over N.

        Of prompts as they are drawn, every completion counted: a buffer that is refilled, or prompts drawn by their difficulty,
        are another distribution than the one whose mean reward J is.
        """
        trainer, args = self._trainer, self._trainer.args
        if any(getattr(args, name, value) != value for name, value in _REWARD_GRADIENT.items()):
            return None
        own = trainer.__dict__.get("_compute_loss", getattr(type(trainer), "_compute_loss", None))
        if getattr(own, "__module__", "").partition(".")[0] != "trl" or getattr(own, "__name__", "") != "_compute_loss":
            return None  # a loss of somebody's own
        group = int(args.num_generations)
        return float(args.max_completion_length) * group / (group - 1)
