"""Whether a model's `generate` draws from the distribution that its completions are scored by.

Generation keeps a cache, makes positions of its own and may put tokens in front or behind (XLM, XLNet, CPM-Ant), or leave them
out. A few tokens are drawn, of a short prompt beside a longer one, and the log-probabilities that generation gave them are held
against those of one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from entropy_core.batch import SequenceBatch
from entropy_core.passes.forward import input_device
from entropy_core.scores import token_statistics
from rl_training.premises.full_precision import agreement, coarsest_dtype
from rl_training.sampling import SamplingConfig, generate_scored

_DRAWN = 4  # tokens of each prompt
_LONGER = (
    6  # tokens of the longer prompt: with those drawn a batch so short that what starts at a length (LongRoPE) has not
)


def generation_finding(
    model: nn.Module, token_ids: Sequence[int], temperature: float, pad_token_id: int = 0
) -> str | None:
    """What is wrong where `model` draws otherwise than it is scored; None within rounding. No random stream is moved.

    Args:
        token_ids: a prompt, of which the beginning is used.
        temperature: of the distribution.
    """
    prompts = [list(token_ids)[:_LONGER], list(token_ids)[: max(1, min(_LONGER, len(token_ids)) // 2)]]
    config = SamplingConfig(temperature, _DRAWN, (), pad_token_id)
    drawn = generate_scored(model, prompts, config, seed=0)
    completions = [tokens for tokens, _ in drawn]
    batch = SequenceBatch.from_sequences(prompts, completions, [0, 1], pad_token_id, temperature).to(
        input_device(model)
    )
    scored = token_statistics(model, batch).logprobs
    gaps = [
        (scored[row][batch.completion_mask[row]].double().cpu() - torch.tensor(given, dtype=torch.float64)).abs()
        for row, (_, given) in enumerate(drawn)
    ]
    difference = max(float(gap.median()) for gap in gaps)  # rounding may send a token to another expert
    if difference <= 2 * agreement(coarsest_dtype(model)).logprob:
        return None
    return (
        "the model draws by another distribution than its completions are scored by: log-probabilities of tokens that it has "
        f"just drawn differ by {difference:.2g} nats from those of one forward pass over them (a cache, positions or tokens "
        "that its `generate` adds or leaves out)"
    )
