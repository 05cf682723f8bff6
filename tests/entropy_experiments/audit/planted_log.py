"""A TRL run that is recorded, with what its log would have said under each mistake that a trainer can make.

The wrong values are computed inside the trainer, by plain torch on its own padded micro-batches and with the weights of that
moment: nothing here is shared with the audit. `Planted.log` puts one kind of them into a copy of the run's log.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rl_training.integrations.step_recorder import record_steps

EOS, PAD = 1, 0


def statistics(
    model: Any, inputs: dict[str, Any], temperature: float, late: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(entropies, log-probabilities, mask) of a micro-batch, (n, C) each."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits.float() / temperature
    logits = logits[:, -width:] if late else logits[:, -width - 1 : -1]
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return entropy, logp.gather(2, inputs["completion_ids"][..., None])[..., 0], inputs["completion_mask"].float()


def token_mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    return float((values * mask).sum() / mask.sum())


def of_micro_batch(model: Any, inputs: dict[str, Any], temperature: float) -> dict[str, float]:
    """kind -> what a trainer with that mistake would append to its list of entropies."""
    h, logp, mask = statistics(model, inputs, temperature)
    if "tool_mask" in inputs:
        foreign_too, mask = mask, mask * inputs["tool_mask"].float()
    else:
        foreign_too = mask
    ids = inputs["completion_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        coarse = statistics(model, inputs, temperature)[0].float()
    last = ids.gather(1, (inputs["completion_mask"].sum(1, keepdim=True) - 1).clamp(min=0))
    ended = ((last == EOS) | (last == PAD)).float() * mask
    trained = (inputs["advantages"].abs() > 1e-6).float()[:, None] * mask
    return {
        "right": token_mean(h, mask),
        "surprisal": token_mean(-logp, mask),
        "temperature_1": token_mean(statistics(model, inputs, 1.0)[0], mask),
        "temperature_0.55": token_mean(statistics(model, inputs, 0.55)[0], mask),
        "temperature_0.5523": token_mean(statistics(model, inputs, 0.5523)[0], mask),
        "sequence_means": float(((h * mask).sum(1) / mask.sum(1)).mean()),
        "padding": float(h.mean()),
        "padding_as_zero": float((h * mask).mean()),
        "without_eos": token_mean(h, mask * (ids != EOS)),
        "terminated": token_mean(h, mask * ended) if ended.any() else math.nan,
        "filtered": token_mean(h, trained) if trained.any() else math.nan,
        "bf16": token_mean(coarse, mask),
        "bits": token_mean(h, mask) / math.log(2),
        "perplexity": math.exp(token_mean(h, mask)),
        "per_completion": float((h * mask).sum(1).mean()),
        "foreign": token_mean(h, foreign_too),
        "late": token_mean(statistics(model, inputs, temperature, late=True)[0], mask),
        "surprisal_of_sequences": float(((-logp * mask).sum(1) / mask.sum(1)).mean()),
        "surprisal_at_1": token_mean(-statistics(model, inputs, 1.0)[1], mask),
        "without_first": token_mean(h, mask * (mask.cumsum(1) > 1)),
    }


def _whole(inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs["completion_mask"]
    return torch.where(mask.any(1, keepdim=True), mask, torch.ones_like(mask))


class Planted(TrainerCallback):
    """Watches a trainer; afterwards knows, per kind, what each step would have appended to the log."""

    def __init__(self, trainer: Any) -> None:
        self.run = Path(trainer.args.output_dir)
        self.lists: dict[int, dict[str, list[float]]] = {}
        self._trainer, self._step, self._inputs, self._earlier = trainer, 1, [], None
        original = trainer._compute_loss

        def compute(model: Any, inputs: dict[str, Any]) -> Any:
            with torch.no_grad():
                self._note(of_micro_batch(model, inputs, trainer.args.temperature))
                self._note_unmasked(model, inputs)
                if self._earlier is not None:
                    today = {n: p.detach().clone() for n, p in model.named_parameters()}
                    model.load_state_dict(self._earlier, strict=False)
                    self._note({"stale": self._entropy(model, inputs)})
                    model.load_state_dict(today, strict=False)
            self._inputs.append(inputs)
            return original(model, inputs)

        trainer._compute_loss = compute
        trainer.add_callback(self)

    def _note_unmasked(self, model: Any, inputs: dict[str, Any]) -> None:
        """Where whole completions are masked out: their tokens are all columns, for what is masked was cut at the longest."""
        h, _, mask = statistics(model, {**inputs, "completion_mask": _whole(inputs)}, self._trainer.args.temperature)
        for value in (h * mask).sum(), mask.sum():
            self._note({"sums_without_mask": float(value)})

    def _entropy(self, model: Any, inputs: dict[str, Any]) -> float:
        return of_micro_batch(model, inputs, self._trainer.args.temperature)["right"]

    def _note(self, values: dict[str, float]) -> None:
        for kind, value in values.items():
            self.lists.setdefault(self._step, {}).setdefault(kind, []).append(value)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = {n: p.detach().clone() for n, p in self._trainer.model.named_parameters()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for inputs in self._inputs:
                self._note({"after": self._entropy(self._trainer.model, inputs)})
        self._earlier, self._inputs = self._before, []
        self._step = state.global_step + 1

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._step - 1

    def unmasked(self, step: int) -> float:
        """Mean entropy of all tokens of the step's completions, those of masked ones included."""
        pairs = self.lists[step]["sums_without_mask"]
        return sum(pairs[0::2]) / sum(pairs[1::2])

    def mean(self, kind: str, first: int, last: int) -> float:
        """What the log would have said of these steps."""
        values = [v for step in range(first, last + 1) for v in self.lists[step].get(kind, []) if v == v]
        return sum(values) / len(values) if values else math.nan

    def copy_with(self, folder: Path, change: Callable[[dict[str, Any], int], dict[str, float]]) -> Path:
        """A copy of the run whose log says otherwise: change(row, first step of it) -> new values."""
        shutil.copytree(self.run, folder)
        for state in folder.glob("checkpoint-*/trainer_state.json"):
            content, before = json.loads(state.read_text()), 0
            for row in content["log_history"]:
                if "entropy" in row:
                    row.update({k: v for k, v in change(row, before + 1).items() if v == v})
                    before = row["step"]
            state.write_text(json.dumps(content))
        return folder

    def log(self, folder: Path, kind: str, digits: int | None = None) -> Path:
        """A copy of the run whose `entropy` is of this kind."""

        def change(row: dict[str, Any], first: int) -> dict[str, float]:
            value = self.mean(kind, first, row["step"])
            return {"entropy": value if digits is None else round(value, digits)}

        return self.copy_with(folder, change)


def train_recorded(trainer: Any) -> Planted:
    """Train, recorded; `trainer` saves a checkpoint at every step."""
    planted = Planted(trainer)
    record_steps(trainer)
    trainer.train()
    return planted
