"""Every case of the table: rows, gradients and folds are plain autograd's, on the path that the documentation's table names.

The reference here shares no code with the library: one sequence at a time, `model(input_ids=...)`, log-softmax, autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket, SequenceBatch, length_buckets
from entropy_core.directional import entropy_derivatives, token_derivatives
from entropy_core.entropy import entropy_coefficients, score_coefficients
from entropy_core.fold_gradients import fold_gradients
from entropy_core.gradients import entropy_gradient, gradient_rows
from entropy_core.passes.fold_rows import FoldRows
from entropy_core.passes.row_formation import RowFormation
from entropy_core.passes.settings import PassSettings
from entropy_core.passes.shared_prefix import shared_prefix_buckets, shares_prefixes
from entropy_core.scores import token_statistics
from tests.entropy_core.policy_table import CASES, INSERT_POSITIONS, VOCABULARY, PolicyCase

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "models-and-adapters.md"
TOLERANCE = 1e-5
# Of central differences, where an operation has no forward-mode rule, and of float32.
COARSE = 2e-3
PROMPTS = (5, 3, 7)
INDEX = (0, 0, 1, 2, 2)
LENGTHS = (4, 6, 5, 3, 8)


@dataclass(frozen=True)
class Measured:
    """Errors relative to the norm of what is right, and the paths that were taken. exact: derivatives by forward mode."""

    rows: float
    gradient: float
    folds: float
    shared: float | None
    derivative: float
    row_path: str
    fold_path: str
    exact: bool


def sequences() -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    prompts = [draw(n) for n in PROMPTS]
    return [prompts[i] for i in INDEX], [draw(n) for n in LENGTHS]


def _terms(model: nn.Module, prompt: list[int], completion: list[int]) -> tuple[Tensor, Tensor]:
    """log pi and H of a completion's tokens."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    return logprobs[range(len(completion)), completion], -(logprobs.exp() * logprobs).sum(-1)


def reference(model: nn.Module) -> tuple[Tensor, Tensor]:
    """(N, D) score rows, and (D,) the Rao-Blackwell gradient of h."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(value: Tensor, more: bool = False) -> Tensor:
        found = torch.autograd.grad(value, parameters, retain_graph=more, allow_unused=True)
        return torch.cat(
            [
                torch.zeros(p.numel()) if g is None else g.flatten().double()
                for g, p in zip(found, parameters, strict=True)
            ]
        )

    terms = [_terms(model, p, c) for p, c in zip(*sequences(), strict=True)]
    total = sum(LENGTHS)
    h = sum(float(entropies.detach().sum()) for _, entropies in terms) / total
    rows, whole = [], 0.0
    for logprobs, entropies in terms:
        to_go = (entropies.detach() - h).flip(0).cumsum(0).flip(0)
        rows.append(gradient(logprobs.sum(), more=True))
        whole = whole + gradient(entropies.sum() + (to_go * logprobs).sum()) / total
    assert isinstance(whole, Tensor)
    return torch.stack(rows), whole


def _flat(named: dict[str, Tensor], rows: int = 0) -> Tensor:
    return torch.cat([t.reshape(rows, -1) if rows else t.flatten() for t in named.values()], -1).double()


def _error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def measured(case: PolicyCase) -> Measured:
    """In float64, or float32 where an operation of the model has no other."""
    try:
        return _measured(case, torch.float64)
    except RuntimeError:
        return _measured(case, torch.float32)


def _measured(case: PolicyCase, dtype: torch.dtype) -> Measured:
    model = case.make(dtype)
    expected_rows, expected = reference(model)
    prompts, completions = sequences()
    batch = SequenceBatch.from_sequences(prompts, completions, INDEX, pad_token_id=0)
    said: list[str] = []
    formation = RowFormation(announce=said.append)
    rows = gradient_rows(model, batch, score_coefficients(batch), passes=PassSettings(method=formation))
    assert len(said) == (formation.in_use == "loop")
    gradient = entropy_gradient(model, batch)

    def folded(buckets) -> tuple[Tensor, FoldRows]:  # noqa: ANN001
        known = FoldRows()
        (found,), _ = fold_gradients(
            model, batch, lambda s: [entropy_coefficients(s, batch)], buckets, folds=3, rows=known
        )
        return _flat({name: folds.sum(0) for name, folds in found.folds.items()}), known

    def buckets(some: SequenceBatch) -> list[Bucket]:
        return length_buckets(some)

    folds, known = folded(buckets)
    shared = _error(folded(shared_prefix_buckets)[0], expected) if shares_prefixes(model, batch) else None
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(g.shape, generator=generator).to(g) * g.abs().mean() for n, g in gradient.items()}
    statistics, along, exact = token_statistics(model, batch), token_derivatives(model, batch, direction), True
    try:
        token_derivatives(model, batch, direction, method="forward")
    except ValueError:
        exact = False
    change = float(entropy_derivatives(statistics, along, batch).mean())
    scale = float(expected.norm() * _flat(direction).norm())
    return Measured(
        _error(_flat(rows, len(INDEX)), expected_rows),
        _error(_flat(gradient), expected),
        _error(folds, expected),
        shared,
        abs(change - float(_flat(direction) @ expected)) / scale,
        formation.in_use,
        "hooks" if known.failure is None else "passes",
        exact and dtype == torch.float64,
    )


def row(case: PolicyCase, found: Measured) -> str:
    """A line of the documentation's table."""
    return f"| {case.architecture} | {case.adapter} | {found.row_path} | {found.fold_path} |"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_policy_is_predicted_as_autograd_says(case: PolicyCase) -> None:
    found = measured(case)
    for what in ("rows", "gradient", "folds", "shared"):
        error = getattr(found, what)
        assert error is None or error < TOLERANCE, f"{what}: {found}"
    assert found.derivative < (TOLERANCE if found.exact else COARSE), f"<grad h, d>: {found}"
    assert row(case, found) in PAGE.read_text(), (
        f"the table in {PAGE.name} says otherwise than {found}: python -m tests.entropy_core.policy_table"
    )


def test_the_documentations_table_holds_these_cases_and_no_others() -> None:
    lines = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.count("|") == 5]
    said = [(a.strip(), b.strip()) for a, b in lines[2:]]
    assert said == [(case.architecture, case.adapter) for case in CASES] and len(said) >= 45


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", INSERT_POSITIONS)
def test_what_inserts_positions_is_refused_by_name(name: str) -> None:
    model = PolicyCase("llama", name).make(torch.float64)
    prompts, completions = sequences()
    batch = SequenceBatch.from_sequences(prompts, completions, INDEX, pad_token_id=0)
    for call in (token_statistics, entropy_gradient):
        with pytest.raises(ValueError, match=r"inserts or drops positions \(prompt tuning does\)"):
            call(model, batch)
