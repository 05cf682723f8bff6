"""Whose entropy a trainer's probe watches, where its configuration leaves that open: held-out sequences if it can draw any."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from rl_training.errors import UserError
from rl_training.integrations.fresh_prompts import refuse_prompts
from rl_training.probe_config import EntropyProbeConfig

OF_PROMPTS = ("fresh", "pool")
"""Sources of sequences that are drawn for the probe."""

OVERLAP = (
    "`measured` and `predicted` are of the step's own sequences, which it learns from: they hold that overlap, and may be "
    "several times the policy's own change where all weights are trained"
)

# The probe keeps so many prompts to draw from: the first of a stream; of a data set, which may be sorted, from all over it.
_PROMPTS_TAKEN = 1024


class WatchedSource(NamedTuple):
    """Attributes:
    config: with its `rollouts` known. prompts: to draw from; none where nothing is drawn. word: what a user is to know, or none.
    """

    config: EntropyProbeConfig
    prompts: list[dict[str, Any]]
    word: str | None


def watched_source(trainer: Any, rows: Sequence[dict[str, Any]] | None, config: EntropyProbeConfig) -> WatchedSource:
    """Find the prompts, and say what is watched.

    Args:
        trainer: a GRPOTrainer.
        rows: held-out prompts; None for those of its evaluation set, or else of its training set.

    Raises:
        UserError: where `config` asks for sequences of prompts that cannot be drawn.
    """
    if config.rollouts in OF_PROMPTS:
        return WatchedSource(config, _prompts(trainer, rows, config.rollouts), None)
    spread = _spread_weights(trainer)
    if config.mode == "watch" and spread is not None:
        own = config.on_own_sequences().model_copy(update={"predict_every": None, "parts_every": 0, "shares": False})
        return WatchedSource(
            own, [], f"{spread} spreads the weights over processes: nothing is drawn or predicted. {OVERLAP}"
        )
    if config.rollouts is not None:
        word = OVERLAP if config.mode == "watch" and config.rollouts == "current" else None
        return WatchedSource(config, [], word)
    try:
        prompts = _prompts(trainer, rows, "pool")
    except UserError as error:
        return WatchedSource(config.on_own_sequences(), [], f"{error}. Without them {OVERLAP}")
    return WatchedSource(config.model_copy(update={"rollouts": "pool"}), prompts, None)


def held_out_prompts(trainer: Any, rows: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Prompts for a pool of held-out sequences: `rows`, or those of the trainer's evaluation set, or else of its training set.

    Raises:
        UserError: where none can be drawn of.
    """
    return _prompts(trainer, rows, "pool")


def _evenly(dataset: Any, most: int) -> list[dict[str, Any]]:
    """At most so many rows of a data set, from its whole length where it has one."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return list(islice(iter(dataset), most))
    count = len(dataset)
    return [dataset[i * count // most] for i in range(most)] if count > most else [dataset[i] for i in range(count)]


def _spread_weights(trainer: Any) -> str | None:
    """What will spread the policy's weights over processes once training begins."""
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return "ZeRO-3" if getattr(plugin, "zero_stage", 0) == 3 else None


def _prompts(trainer: Any, rows: Sequence[dict[str, Any]] | None, source: str) -> list[dict[str, Any]]:
    if rows is None:
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        sets = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
        rows = [row for some in sets for row in _evenly(some, -(-_PROMPTS_TAKEN // len(sets)))]
    refuse_prompts(trainer, rows, source)
    if len(rows) < (2 if source == "pool" else 1):  # an error needs two prompts
        raise UserError(
            f"rollouts={source}: the entropy probe has no prompts to draw from, or one: give it held-out rows"
        )
    return [{"prompt_index": i, **row} for i, row in enumerate(rows)]
