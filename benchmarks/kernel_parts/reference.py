"""Both kernels by plain autograd in float64, one sequence after the other; shares no code with what is measured.

    K1(t, i) = dS_t^T diag(P) dS_i
    KH(t, i) = E_t^T  diag(P) dS_i,   E_t = d/dtheta (n / sum of lengths) sum_k [ H_k + (sum over k' >= k of H_k' - h) log pi_k ]

with the bracket's second factor held fixed and h the batch's mean entropy in nats per token (Rao-Blackwell, per token).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entropy_core.batch import SequenceBatch
from kernel_parts.cases import Case

# Cases whose model is too large for all of it: rows and columns that are looked at, spread evenly.
REFERENCE_ROWS = {"smollm2": 8, "smollm2-apart": 8}


def reference(case: Case, name: str) -> dict[str, Tensor]:
    """{"rows", "columns": (m,), (m',) indices; "kernel", "entropy_kernel": (m, m') float64}. The model is float64 afterwards."""
    most = REFERENCE_ROWS.get(name)
    places = [
        torch.arange(len(side)) if most is None else torch.linspace(0, len(side) - 1, min(most, len(side))).long()
        for side in (case.rows, case.columns)
    ]
    p = {n: value.double() for n, value in case.preconditioner.items()}
    model = case.model.double()
    parameters = {n: q for n, q in model.named_parameters() if q.requires_grad}
    with torch.no_grad():
        entropies = [_tokens(model, case.rows, index)[1] for index in range(len(case.rows))]
    tokens = sum(len(e) for e in entropies)
    h = torch.cat(entropies).mean()

    def gradient(objective: Tensor, retain: bool = False) -> dict[str, Tensor]:
        return dict(
            zip(parameters, torch.autograd.grad(objective, list(parameters.values()), retain_graph=retain), strict=True)
        )

    columns = [gradient(_tokens(model, case.columns, i)[0].sum()) for i in places[1].tolist()]
    kernels = torch.zeros(2, len(places[0]), len(columns), dtype=torch.float64)
    for place, t in enumerate(places[0].tolist()):
        logprobs, entropy = _tokens(model, case.rows, t)
        to_come = (entropy.detach() - h).flip(0).cumsum(0).flip(0)
        estimate = (entropy + to_come * logprobs).sum() * len(case.rows) / tokens
        for which, row in enumerate((gradient(logprobs.sum(), retain=True), gradient(estimate))):
            weighted = {n: row[n] * p[n] for n in parameters}
            for i, column in enumerate(columns):
                kernels[which, place, i] = sum(float((weighted[n] * column[n]).sum()) for n in parameters)
    return {"rows": places[0], "columns": places[1], "kernel": kernels[0], "entropy_kernel": kernels[1]}


def _tokens(model: nn.Module, batch: SequenceBatch, index: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (T,), of the completion tokens of one sequence."""
    attended = batch.attention_mask[index]
    ids = batch.input_ids[index][attended]
    chosen = batch.completion_mask[index][attended][1:]
    logprobs = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1][chosen], -1)
    return logprobs.gather(1, ids[1:][chosen][:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)
