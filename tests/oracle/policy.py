"""Two small policies whose completions can all be enumerated.

`RecurrentPolicy` is generic: its next-token distribution depends on the whole prefix through a leaky recurrent state,
so that prefix-dependent terms of the entropy gradient are large. `DyadicPolicy` has next-token probabilities
in whole eighths, of another shape at every prefix: a completion of at most three tokens then has a
probability that is a whole multiple of 1/512, and a batch in which every completion stands 512·π(t|p) times
*is* the policy's distribution. On that batch a sample mean is an exact expectation, also inside self-
normalised estimators.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

END_TOKEN = 0


class RecurrentPolicy(nn.Module):
    """A causal language model of four small layers; the state decays geometrically over the prefix.

    Parameters
    ----------
    vocabulary : number of tokens, `END_TOKEN` included.
    width : width of the hidden layers.
    seed : of the parameters, drawn wide enough to be far from uniform and from one-hot.
    """

    def __init__(self, vocabulary: int = 4, width: int = 5, seed: int = 7, decay: float = 0.6) -> None:
        super().__init__()
        self.decay = decay
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width, bias=False)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor, **ignored: object) -> SimpleNamespace:
        """Logits (N, L, V) of the token after each position; a position sees itself and what stands to its
        left."""
        embedded = self.embedding(input_ids)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        lag = steps[:, None] - steps[None, :]
        decays = torch.where(lag >= 0, self.decay ** lag.clamp(min=0).to(embedded.dtype), 0.0)
        state = decays @ torch.tanh(self.mix(embedded))
        return SimpleNamespace(logits=self.head(torch.tanh(self.hidden(state) + embedded)))


class DyadicPolicy(nn.Module):
    """A table of log-probabilities over prefixes, behind a linear layer that starts as the identity.

    Vocabulary of three, sequences of at most `max_length` tokens with the prompt; each prefix has a row of
    its own, whose probabilities are one of `EIGHTHS`, permuted: entropies from 0.74 to 1.08 nats. Both layers
    are trainable, so the gradient is not trivial.
    """

    VOCABULARY = 3
    EIGHTHS = ((6, 1, 1), (5, 2, 1), (3, 3, 2))

    def __init__(self, max_length: int = 5, seed: int = 3) -> None:
        super().__init__()
        base = self.VOCABULARY + 1
        prefixes = base**max_length
        self.table = nn.Embedding(prefixes, self.VOCABULARY)
        self.head = nn.Linear(self.VOCABULARY, self.VOCABULARY)
        self.double()
        generator = torch.Generator().manual_seed(seed)
        distributions = (torch.tensor(self.EIGHTHS, dtype=torch.float64) / 8).log()
        chosen = distributions[torch.randint(0, len(distributions), (prefixes,), generator=generator)]
        order = torch.rand(prefixes, self.VOCABULARY, generator=generator).argsort(dim=1)
        with torch.no_grad():
            self.table.weight.copy_(chosen.gather(1, order))
            self.head.weight.copy_(torch.eye(self.VOCABULARY))
            self.head.bias.zero_()
        self.max_length = max_length

    def forward(self, input_ids: Tensor, **ignored: object) -> SimpleNamespace:
        """Logits (N, L, V); the row of the table is the number whose digits are the prefix (wrapped beyond
        `max_length`)."""
        base = self.VOCABULARY + 1
        number = torch.zeros_like(input_ids[:, 0])
        rows = []
        for position in range(input_ids.shape[1]):
            number = (number * base + input_ids[:, position] + 1) % self.table.num_embeddings
            rows.append(number)
        return SimpleNamespace(logits=self.head(self.table(torch.stack(rows, dim=1))))


@dataclass(frozen=True)
class Task:
    """What is needed to enumerate a policy: prompts of different lengths and the longest completion."""

    prompts: tuple[tuple[int, ...], ...]
    vocabulary: int
    max_completion_length: int
    end_token: int = END_TOKEN


RECURRENT_TASK = Task(prompts=((1,), (2, 3), (3, 1, 2)), vocabulary=4, max_completion_length=4)
DYADIC_TASK = Task(prompts=((1,), (2, 1)), vocabulary=3, max_completion_length=3)
