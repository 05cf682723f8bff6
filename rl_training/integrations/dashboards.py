"""How the probe's metrics stand together in a dashboard: one list of charts, for TensorBoard, W&B and trackio.

A trainer's loggers put "train/" before every name. TensorBoard gets the charts as a layout for its *Custom Scalars* page, written
by `TensorBoardLayout`; W&B by `examples/wandb_workspace.py`; trackio groups what shares a prefix by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

PREFIX = "train/entropy_probe/"


@dataclass(frozen=True)
class Chart:
    """A chart of metrics under entropy_probe/. band: three metrics, a value and the ends of its interval; else lines."""

    title: str
    metrics: tuple[str, ...]
    band: bool = False

    @property
    def tags(self) -> list[str]:
        """The metrics as a logger has them."""
        return [PREFIX + metric for metric in self.metrics]


_SUMS = ("cumulative_predicted", "cumulative_predicted_where_measured", "cumulative_measured")

CHARTS = (
    Chart("Entropy, nats per token", ("entropy", "entropy_filtered")),
    Chart("Entropy without its noise, 80% band", ("entropy_filtered", "entropy_filtered_low", "entropy_filtered_high"), True),
    Chart("Change by a step: predicted, measured", ("predicted", "measured", "measured_filtered")),
    Chart("Parts of the prediction", ("batch", "momentum", "decay")),
    Chart("Sum of changes since the start", _SUMS),
    Chart("Predicted with measured: correlation, 95% interval", ("correlation", "correlation_low", "correlation_high"), True),
    Chart("Standard errors", ("entropy_se", "predicted_se", "measured_se")),
    Chart("Sequences that count (effective sample)", ("ess", "weights_ess")),
    Chart("Steps until the floor", ("steps_to_floor",)),
)  # fmt: skip
"""In the order of a page. A chart of metrics that a mode does not log stays empty."""


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """CHARTS as `SummaryWriter.add_custom_scalars` takes them.

    >>> tensorboard_layout()["Entropy probe"]["Parts of the prediction"][1][0]
    'train/entropy_probe/batch'
    """
    return {"Entropy probe": {chart.title: ["Margin" if chart.band else "Multiline", chart.tags] for chart in CHARTS}}


class TensorBoardLayout(TrainerCallback):
    """Writes the layout beside the metrics when training begins, where the trainer logs to TensorBoard; else does nothing.

    Args:
        trainer: whose loggers are looked through. `attach_entropy_probe` adds this callback by itself.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._loggers = trainer.callback_handler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Loggers that the trainer makes by itself come before callbacks that are added: the writer is there."""
        for logger in self._loggers.callbacks:
            if isinstance(logger, TensorBoardCallback) and logger.tb_writer is not None:
                logger.tb_writer.add_custom_scalars(tensorboard_layout())
