"""A training loop written by hand, with the entropy probe in it: REINFORCE on SmolLM2, no trainer."""

import sys

import torch

from entropy_core import SequenceBatch
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.models import load_model_and_tokenizer
from rl_training.sampling import draw, make_sampling_config


def loss_of(model: torch.nn.Module, batch: SequenceBatch, advantages: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return -(advantages[:, None] * logprobs * batch.completion_mask[:, 1:]).sum() / len(batch)


class Watched:
    """The adapter: wrap the optimizer's step. `batch` is what the policy has just drawn, before anything is filtered."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.AdamW, config: EntropyProbeConfig) -> None:
        self.optimizer, self.probe = optimizer, SimpleEntropyProbe(config, model)

    def step(self, batch: SequenceBatch) -> str:
        self.probe.observe(batch)
        self.probe.before_step(self.optimizer)  # gradients are clipped by now
        self.optimizer.step()
        change = self.probe.after_step()
        return (
            f"predicted {change.total.value:+.4f} ± {change.total.standard_error:.4f} "
            f"(batch {change.batch.value:+.4f}, momentum {change.momentum.value:+.4f}), "
            f"measured {change.measured.change:+.4f} nats per token"
        )


def main(model_name: str = "smollm2-135m", steps: int = 4) -> None:
    model, tokenizer = load_model_and_tokenizer(model_name)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    watched = Watched(model, optimizer, EntropyProbeConfig(mode="simple", standard_error_folds=4))
    sampling_config = make_sampling_config(model, tokenizer, temperature=1.0, max_completion_length=8)
    rows = [{"prompt": f"{a} + {b} =", "prompt_index": 6 * a + b} for a in range(6) for b in range(6)]
    for step in range(steps):
        rollouts = draw(model, tokenizer, rows[step % 6 :: 6], 4, sampling_config, seed=step, status="training")
        batch = rollouts.to_batch(sampling_config)
        rewards = torch.tensor([float("7" in text) for text in rollouts.completion])
        optimizer.zero_grad()
        loss_of(model, batch, rewards - rewards.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        print(f"step {step + 1}: {watched.step(batch)}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
