"""A real AdamW step of a tiny policy in float64, with settled moments, and everything that analyses of it need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import Estimator
from entropy_core.gradients import dot, entropy_gradient, per_sequence_gradients, trainable_parameters
from entropy_core.scores import TokenStatistics, token_statistics
from entropy_experiments.analyses.arrays import SequenceLabels
from entropy_experiments.analyses.intervention import SharePrediction
from entropy_experiments.step.gradient_rows import KeptRows
from entropy_experiments.step.optimizer_step import NextStep, take_next_step
from entropy_experiments.step.real_steps import StepMeasurement
from entropy_experiments.step.shares import attribute
from tests.oracle.model_cases import CASES

END, VOCABULARY, LONGEST = 2, 37, 6
CASE = next(case for case in CASES if case.name == "llama_untied_lora")


def sample_batch(model: nn.Module, prompts: int, completions: int, generator: torch.Generator) -> SequenceBatch:
    """`completions` draws for each of `prompts` random prompts of three tokens, from the policy itself."""
    prompt_ids = [torch.randint(3, VOCABULARY, (3,), generator=generator).tolist() for _ in range(prompts)]
    prompt_ids = [prompt for prompt in prompt_ids for _ in range(completions)]
    drawn: list[list[int]] = [[] for _ in prompt_ids]
    with torch.no_grad():
        for _ in range(LONGEST):
            ids = torch.tensor([p + d + [END] * (LONGEST - len(d)) for p, d in zip(prompt_ids, drawn, strict=True)])
            places = torch.tensor([len(p) + len(d) - 1 for p, d in zip(prompt_ids, drawn, strict=True)])
            logits = model(input_ids=ids).logits[torch.arange(len(ids)), places]
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten().tolist()
            for completion, token in zip(drawn, tokens, strict=True):
                if not completion or completion[-1] != END:
                    completion.append(token)
    index = [n // completions for n in range(len(prompt_ids))]
    return SequenceBatch.from_sequences(prompt_ids, drawn, index, pad_token_id=0)


@dataclass(frozen=True)
class TinyStep:
    """columns: raw rows dS_i. weights: (n_train,) of the loss. step: the AdamW step that they cause."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    train: SequenceBatch
    evaluation: SequenceBatch
    statistics: TokenStatistics
    columns: dict[str, Tensor]
    weights: Tensor
    step: NextStep
    max_norm: float | None

    def gradient_of_h(self, estimator: Estimator = "split") -> dict[str, Tensor]:
        return entropy_gradient(self.model, self.evaluation, estimator, statistics=self.statistics)

    def shares(self, estimator: Estimator = "split") -> Tensor:
        gradient = self.gradient_of_h(estimator)
        return attribute(gradient, KeptRows(self.columns), self.weights, self.step).shares

    def prediction(self, estimator: Estimator = "split") -> SharePrediction:
        gradient, update = self.gradient_of_h(estimator), self.step.update
        rest = dot(gradient, update.momentum) + dot(gradient, update.weight_decay)
        return SharePrediction(self.shares(estimator).numpy(), rest)

    def measurement(self) -> StepMeasurement:
        return StepMeasurement(
            self.model,
            self.optimizer,
            KeptRows(self.columns),
            self.evaluation,
            self.statistics,
            max_grad_norm=self.max_norm,
        )


def make_step(
    learning_rate: float = 1e-5,
    max_norm: float | None = None,
    settled: bool = True,
    poison: tuple[int, float] | None = None,
    seed: int = 0,
) -> TinyStep:
    """16 training sequences of 8 prompts, 24 evaluation prompts. settled: second moments that this batch hardly moves.

    poison: (training sequence, factor on its weight).
    """
    generator = torch.Generator().manual_seed(seed)
    model = CASE.make(torch.float64)
    train, evaluation = sample_batch(model, 8, 2, generator), sample_batch(model, 24, 1, generator)
    weights = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    weights = (weights - weights.mean(1, keepdim=True)).flatten() / (len(train) * LONGEST)
    if poison is not None:
        weights[poison[0]] *= poison[1]
    columns = per_sequence_gradients(model, train)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.01)
    gradient = {name: -torch.einsum("n,n...->...", weights, rows) for name, rows in columns.items()}
    for name, p in parameters.items():
        noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
        size = float(gradient[name].square().mean()) if settled else 0.1 * float(gradient[name].square().mean())
        optimizer.state[p] = {
            "step": torch.tensor(1e4 if settled else 9.0),
            "exp_avg": 0.3 * size**0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64),
            "exp_avg_sq": size * (0.5 + noise) * (1.0 if settled else 1 - 0.999**9),
        }
    step = take_next_step(model, optimizer, gradient, max_norm)
    statistics = token_statistics(model, evaluation)
    return TinyStep(model, optimizer, train, evaluation, statistics, columns, weights, step, max_norm)


def labels(batch: SequenceBatch, statistics: TokenStatistics) -> SequenceLabels:
    """Labels with made-up texts, rewards 0 and 1 in turn."""
    count = len(batch)
    return SequenceLabels(
        prompt_index=batch.prompt_index.numpy(),
        reward=torch.arange(count).remainder(2).double().numpy(),
        length=batch.completion_lengths.numpy(),
        entropy_sum=statistics.entropy_sums().numpy(),
        score=statistics.scores().numpy(),
        prompt=[f"prompt {int(p)}" for p in batch.prompt_index],
        completion=[f"completion {n}" for n in range(count)],
    )
