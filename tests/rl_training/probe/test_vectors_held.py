"""How many vectors over all trained parameters each mode of the probe holds around a step of full fine-tuning: counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.probe.shares import TrainingSequences
from rl_training.probe.watch import EntropyWatch
from tests.live_tensors import LiveTensors

SLACK = 0.6  # activations of a few short sequences, and one parameter's tensors while it is worked on


class Wide:
    """A policy with many parameters for its few tokens, its AdamW after a step, and final gradients of the next."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **shape)).train()
        self.parameters = list(self.model.parameters())
        self.bytes = 4 * sum(p.numel() for p in self.parameters)
        tokens = torch.randint(2, 60, (8, 6)).tolist()
        prompts = [n // 2 for n in range(8)]
        self.batch = SequenceBatch.from_sequences([t[:2] for t in tokens], [t[2:] for t in tokens], prompts, 0)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.1)
        self.backward()
        self.optimizer.step()

    @property
    def training(self) -> TrainingSequences:
        advantages = torch.linspace(-1, 1, 8, dtype=torch.float64)
        return TrainingSequences(self.batch, advantages, advantages / 100)

    def backward(self) -> None:
        weights = torch.linspace(1, -1, 8, dtype=torch.float64) / 100
        found = batch_gradients(self.model, self.batch, [score_coefficients(self.batch, weights)])[0]
        for p, gradient in zip(self.parameters, found.values(), strict=True):
            p.grad = gradient

    def vectors(self, call: Callable[[], object]) -> float:
        with LiveTensors() as counter:
            call()
        return counter.peak / self.bytes


def watched(wide: Wide, **config: Any) -> tuple[EntropyWatch, float]:
    """The most of the three calls; nothing lives between them but token statistics."""
    watch = EntropyWatch(EntropyProbeConfig(rollouts="current", **config), wide.model)
    most = wide.vectors(lambda: watch.before_step(wide.batch))
    wide.backward()
    if config.get("parts_every"):
        most = max(most, wide.vectors(lambda: watch.try_parts(wide.optimizer)))
    wide.optimizer.step()
    return watch, max(most, wide.vectors(watch.after_step))


def test_watching_holds_no_vector() -> None:
    """The default mode: forward passes alone."""
    assert watched(Wide())[1] < SLACK


def test_parts_hold_three_and_a_copy_of_the_weights() -> None:
    wide = Wide()
    watch, most = watched(wide, parts_every=1)
    assert watch.parts_bytes() == 4 * wide.bytes
    assert 2 < most <= 4 + SLACK


@pytest.mark.long
@pytest.mark.parametrize("mode", ["simple", "attribution"])
def test_predicting_every_step_holds_what_is_stated(mode: Any) -> None:
    """In all, from the gradient of entropy until the step is compared: the folds' gradients, newest and average, five, and what
    shares need.
    """
    wide = Wide()
    probe = SimpleEntropyProbe(EntropyProbeConfig(mode=mode, standard_error_folds=2, rollouts="current"), wide.model)
    stated = probe.memory_bytes() / wide.bytes
    assert stated == 2 * 2 + 5 + (8 if mode == "attribution" else 0)

    def around_a_step() -> None:
        probe.observe(wide.batch)
        probe.before_step(wide.optimizer, wide.training)
        wide.optimizer.step()
        probe.after_step()

    most = []
    for _ in range(2):
        wide.backward()
        with LiveTensors() as counter:
            around_a_step()
        most.append(counter.peak / wide.bytes)
    rows = 8 / 20  # of one parameter, of 8 sequences: 5% of all numbers are the largest's
    assert 0.5 * stated < max(most) <= stated + SLACK + (rows if mode == "attribution" else 0.0), most
