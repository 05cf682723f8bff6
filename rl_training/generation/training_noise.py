"""Whether a model in training mode is the function that it is in evaluation mode, and what makes it
another.

Completions are drawn, and entropies differentiated, in evaluation mode; the loss is a forward pass
in training mode. Dropout, jitter of a router's inputs, layers left out at random, statistics of the
batch: each makes the loss that of another policy. What is known is named by its module or setting;
that nothing else is there is seen on two forward passes in training mode and one in evaluation
mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entropy_core.passes.forward import checkpointing_off, evaluation_mode, input_device

# Attributes that are probabilities or amplitudes of noise, as transformers and peft name them.
_NOISE = re.compile(
    r"dropout|_pdrop$|^pdrop$|layer_?drop|drop_?path|drop_rate|drop_prob|jitter|neftune|noise_(alpha|std|scale)"
)

# Mean change of a logit, in standard deviations of the logits, that is taken for rounding.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_PRECISION = 3e-2
_COPIES = 4  # layers that are left out at random are left out of a sequence each


def training_noise(model: nn.Module) -> list[str]:
    """What is known to make `model` another function in training mode than in evaluation mode.

    One entry for each kind, in words, e.g. `dropout=0.1 (28 modules, e.g.
    model.layers.0.mlp.down_proj.lora_dropout.default)`; empty where nothing known is there (see
    `train_mode_change` for the rest).
    """
    places: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if isinstance(module, nn.RReLU):
            places.setdefault("a randomised ReLU", []).append(where)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            places.setdefault(f"{type(module).__name__}, which normalises by the batch", []).append(where)
        for key, value in _noisy_attributes(module):
            places.setdefault(f"{'dropout' if key == 'p' else key}={value:g}", []).append(where)
    return [
        f"{kind} ({found[0] if len(found) == 1 else f'{len(found)} modules, e.g. {found[0]}'})"
        for kind, found in places.items()
    ]


def silence_training_noise(model: nn.Module) -> list[str]:
    """Set to 0 what `training_noise` finds and can be set to 0. Returns what it was."""
    before = training_noise(model)
    for module in model.modules():
        for key, _ in _noisy_attributes(module):
            held = getattr(module, key)
            setattr(module, key, dict.fromkeys(held, 0.0) if isinstance(held, dict) else 0.0)
    left = set(training_noise(model))
    return [entry for entry in before if entry not in left]


def train_mode_change(model: nn.Module, token_ids: Sequence[int]) -> float:
    """How far logits in training mode lie from those in evaluation mode and from one another, at
    most; 0 within rounding.

    Mean absolute change of a logit in standard deviations of the logits.

    Args:
        token_ids: one sequence, which passes once in evaluation mode and in a batch of `_COPIES`
            equal ones, twice, in training mode. Random streams, buffers (running statistics) and
            every module's mode are left as they were.
    """
    alone = torch.tensor([list(token_ids)], device=input_device(model))
    buffers = [(b, b.clone()) for b in model.buffers() if b.device.type != "meta"]
    devices = sorted({str(p.device) for p in model.parameters() if p.device.type == "cuda"})
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=devices), torch.no_grad(), checkpointing_off(model):
        try:
            with evaluation_mode(model):
                expected = _logits(model, alone)
            model.train()
            passes = [_logits(model, alone.repeat(_COPIES, 1)) for _ in range(2)]
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)
    scale = float(expected.std()) or 1.0
    changes = [float((a - expected).abs().mean()) / scale for a in passes]
    changes.append(float((passes[0] - passes[1]).abs().mean()) / scale)
    largest = math.inf if any(math.isnan(change) for change in changes) else max(changes)
    return largest if largest > _ROUNDING.get(next(model.parameters()).dtype, _HALF_PRECISION) else 0.0


def _noisy_attributes(module: nn.Module) -> list[tuple[str, float]]:
    """(name, value) of the module's plain attributes that are noise and not 0."""
    found = []
    for key, value in vars(module).items():
        named = _NOISE.search(key.lower()) or (key == "p" and "dropout" in type(module).__name__.lower())
        # peft keeps one value for each adapter
        largest = max(filter(_is_number, value.values()), default=0) if isinstance(value, dict) else value
        if named and _is_number(largest) and largest > 0:
            found.append((key, float(largest)))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits if logits.dtype == torch.float64 else logits.float()
