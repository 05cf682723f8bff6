"""Clip-Cov and KL-Cov on TRL's GRPOTrainer (Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning").

    cov_k = (log pi_k - mean)(A_k - mean)      over the tokens of a micro-batch

    Clip-Cov   tokens drawn among those of cov between two bounds, 0.02% of all, get no gradient
    KL-Cov     |log pi - log pi_old| times a coefficient of 1 is added on the 0.2% of highest cov

The parts of tokens are those of the paper's release. With a few hundred tokens a step at least one token is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

CLIPPED, PENALISED = 2e-4, 2e-3
BOUNDS = (1.0, 5.0)
COEFFICIENT = 1.0


class CovarianceTrainer(GRPOTrainer):
    """The loss is TRL's own; advantages of clipped tokens are 0, or the penalty is added to it."""

    kind = "clip_cov"

    @classmethod
    def of(cls, kind: str) -> type[CovarianceTrainer]:
        return type(f"{kind}_trainer", (cls,), {"kind": kind})

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logprobs = found[0]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"].bool()
        if self.kind == "kl_cov":
            loss = super()._compute_loss(model, inputs)
            return loss + self._penalty(inputs, mask)
        # Advantages by token are what the loss is linear in: zeros take a token out of it.
        with torch.no_grad():
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            logprobs = self._get_per_token_logps_and_entropies(model, ids, attention, mask.shape[1])[0]
            kept = ~self._clipped(_covariance(logprobs, inputs["advantages"], mask), mask)
        return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"][:, None] * kept})

    def _clipped(self, covariance: Tensor, mask: Tensor) -> Tensor:
        within = (mask & (covariance > BOUNDS[0]) & (covariance < BOUNDS[1])).nonzero()
        count = min(len(within), max(1, round(CLIPPED * int(mask.sum()))))
        chosen = within[torch.randperm(len(within), generator=self._generator())[:count]]
        out = torch.zeros_like(mask)
        out[chosen[:, 0], chosen[:, 1]] = True
        return out

    def _penalty(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        logprobs, old = self._logprobs, inputs.get("old_per_token_logps")
        old = logprobs.detach() if old is None else old
        covariance = _covariance(logprobs.detach(), inputs["advantages"], mask)
        count = max(1, round(PENALISED * int(mask.sum())))
        least = covariance[mask].topk(count).values[-1]
        chosen = mask & (covariance >= least)
        # Divided as Dr. GRPO's tokens are.
        size = mask.shape[0] * int(self.max_completion_length or 1) * self.current_gradient_accumulation_steps
        return COEFFICIENT * ((logprobs - old).abs() * chosen).sum() / size

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.args.seed * 100_003 + self.state.global_step)


def _covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    each = advantages[:, None].expand(mask.shape)
    return (logprobs - logprobs[mask].mean()) * (each - each[mask].mean())
