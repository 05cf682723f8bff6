"""How many vectors over all parameters an analysis of a fully trained model holds beside the model: counted, in units of D."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core import formed
from entropy_core.batch import SequenceBatch
from entropy_core.gradients import trainable_parameters
from entropy_experiments.checkpoints.stored_moments import StoredMoments
from entropy_experiments.fisher_analyzer import FisherComputation, analyze_batches
from entropy_experiments.kernel.options import KernelOptions
from entropy_experiments.step.real_steps import StepMeasurement, measure_curve, token_shares
from entropy_experiments.step.settings import AnalysisSettings
from entropy_experiments.step.training_noise import step_change, training_noise
from rl_training.errors import UserError
from rl_training.run.optimizer_state import check_optimizer_state, read_tensor_file
from tests.live_tensors import LiveTensors

pytestmark = pytest.mark.long

MOST_VECTORS = 5
# activations of a few short sequences, and one parameter's tensors while it is worked on
SLACK = 0.6
TRAIN = 4


def batch(count: int, seed: int) -> SequenceBatch:
    tokens = torch.randint(2, 60, (count, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return SequenceBatch.from_sequences(
        [t[:2] for t in tokens], [t[2:] for t in tokens], [n // 2 for n in range(count)], 0
    )


class Wide:
    """A policy with many parameters for its few tokens, and its AdamW's file after two steps."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **shape)).eval()
        self.parameters = trainable_parameters(self.model)
        self.bytes = 4 * sum(p.numel() for p in self.parameters.values())
        self.train, self.evaluation = batch(TRAIN, 1), batch(4, 2)
        self.weights = torch.tensor([1.0, -0.5, 0.7, -1.2], dtype=torch.float64) / TRAIN
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-4, weight_decay=0.1)
        for seed in (3, 4):
            ids = batch(8, seed).input_ids
            self.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.path = folder / "optimizer.pt"
        torch.save(optimizer.state_dict(), self.path)

    def moments(self) -> StoredMoments:
        state = read_tensor_file(self.path)
        return StoredMoments(self.path, state, [list(self.parameters)], [1e-4], self.parameters)

    def analyze(self, moments: StoredMoments, **settings: Any) -> FisherComputation:
        batches = (self.evaluation, self.train, self.weights)
        return analyze_batches(self.model, moments, *batches, AnalysisSettings(max_grad_norm=0.01, **settings))

    def vectors(self, work: Callable[[], object]) -> float:
        with LiveTensors() as counter:
            found = work()
            del found
        return counter.peak / self.bytes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return Wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of this model are formed in pieces, as those of a large one."""
    monkeypatch.setattr(formed, "PIECE", 2**14)


def test_the_count_sees_what_is_held(wide: Wide) -> None:
    def two_vectors() -> dict[str, Tensor]:
        first = {name: p.detach() + 1 for name, p in wide.parameters.items()}
        return {name: 2 * v for name, v in first.items()}

    assert 1.9 < wide.vectors(two_vectors) < 2.1
    assert wide.vectors(lambda: [p.detach().square().sum() for p in wide.parameters.values()]) < SLACK


def test_looking_at_the_moments_holds_none_of_them(wide: Wide) -> None:
    """What `doctor` does of an optimizer's file, and what loading makes of it."""
    steps = [2]
    assert (
        wide.vectors(lambda: check_optimizer_state(wide.path, read_tensor_file(wide.path), steps, None, True)) < SLACK
    )
    assert wide.vectors(lambda: [s.exp_avg.sum() + s.exp_avg_sq.sum() for s in wide.moments().values()]) < SLACK


def test_an_analysis_without_a_matrix_holds_five_vectors(wide: Wide) -> None:
    moments = wide.moments()
    assert wide.vectors(lambda: wide.analyze(moments, compute_full=False)) <= MOST_VECTORS


def test_what_is_asked_afterwards_holds_five_vectors_in_all(wide: Wide) -> None:
    """Other weights' steps, response shares, curves, shares of tokens, noise of the training side: three vectors are there before
    (the loss's gradient and two of entropy).
    """
    moments = wide.moments()
    found = wide.analyze(moments, compute_full=False, measure=False)
    side, model, statistics = found.training, wide.model, found.numbers.eval_statistics
    step, gradient = side.known_step, found.gradients["split"]
    steps = StepMeasurement(model, moments, side.rows, wide.evaluation, statistics, max_grad_norm=0.01)
    change = step_change(gradient, side.adam_step.state, wide.parameters, 0.01)
    subsets = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    asked: dict[str, Callable[[], object]] = {
        "measured step": lambda: steps.measure(wide.weights),
        "response shares": lambda: steps.response_shares(gradient, wide.weights, subsets),
        "curve": lambda: measure_curve(model, step.parameter_delta, (1.0, -1.0), wide.evaluation, statistics),
        "token shares": lambda: token_shares(
            model, wide.train, step.share_direction(gradient), wide.weights, step.clip
        ),
        "noise": lambda: training_noise(
            change, side.gradient, lambda rows: side.rows.gradient_of(rows, wide.weights), wide.train.prompt_index
        ),
    }
    held = 1 + len(found.gradients)
    assert {name: wide.vectors(work) <= MOST_VECTORS - held + 0.3 for name, work in asked.items()} == dict.fromkeys(
        asked, True
    )


@pytest.mark.parametrize("strategy", ["tiles", "memory"])
def test_with_a_matrix_the_plan_says_what_is_held(wide: Wide, strategy: str) -> None:
    """Beside the rows that the plan keeps, no more vectors than it counts."""
    from entropy_experiments.kernel.plan import fixed_bytes

    moments = wide.moments()
    options = KernelOptions(strategy=strategy)
    size = options.size(wide.model, len(wide.evaluation), TRAIN)
    rows = TRAIN * size.row_bytes
    peak = wide.vectors(lambda: wide.analyze(moments, kernel=options)) * wide.bytes
    assert peak <= rows + fixed_bytes(size, strategy) + size.row_bytes


def test_a_file_that_is_written_anew_is_refused(wide: Wide, tmp_path: Path) -> None:
    copy = tmp_path / "optimizer.pt"
    copy.write_bytes(wide.path.read_bytes())
    moments = StoredMoments(copy, read_tensor_file(copy), [list(wide.parameters)], [1e-4], wide.parameters)
    name = next(iter(moments))
    before = moments[name].exp_avg.clone()
    with copy.open("r+b") as file:
        file.write(b"PK")
        file.truncate(copy.stat().st_size + 1)
    with pytest.raises(UserError, match="written anew while it was analysed"):
        moments[name]
    copy.unlink()
    assert torch.equal(moments[name].exp_avg, before), "what is mapped stays when the name goes"
