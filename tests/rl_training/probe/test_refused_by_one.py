"""Where one process alone cannot compute its sequences, all refuse together; and sums are of the same things in all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.processes import Processes
from rl_training.config import EntropyProbeConfig
from rl_training.probe.derivative_check import DerivativeCheck
from rl_training.probe.score_term import FusedScoreTerm
from rl_training.probe.step_prices import _loss_gradients
from rl_training.probe.watch import EntropyWatch
from tests.entropy_core.attention_policy import DistanceAttention
from tests.entropy_core.shared_work import VOCABULARY, random_direction
from tests.two_processes import in_two_processes

_BAD = VOCABULARY - 1
CONFIG = EntropyProbeConfig(rollouts="current")


def _batch() -> SequenceBatch:
    """Two prompts; the second, which is process 1's, has a token whose embedding is to be NaN."""
    prompts, completions = [[1, 2], [1, 2], [3, _BAD], [3, _BAD]], [[4, 5], [6], [7, 8, 9], [2]]
    return SequenceBatch.from_sequences(prompts, completions, [0, 0, 1, 1], 0, 0.9)


def _spoilt(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_parameter("embedding.weight")[_BAD] = torch.nan
    return model


def _ended(action) -> tuple[str, float]:
    """How it ended here, and a sum of ones over all processes afterwards, as training goes on."""
    try:
        action()
        words = "well"
    except ValueError as error:
        words = str(error)
    return words, float(Processes.world().sum(torch.ones(1)))


def _passes() -> dict[str, tuple[str, float]]:
    sharing, batch, out = Processes.world(), _batch(), {}
    for lockstep in (False, True):
        watch = EntropyWatch(CONFIG, _spoilt(DistanceAttention(VOCABULARY).double()), sharing, lockstep)
        out[f"lockstep {lockstep}"] = _ended(lambda watch=watch: watch.look(batch, with_hidden=True))
    model = DistanceAttention(VOCABULARY).double()
    watch = EntropyWatch(CONFIG, model, sharing)
    watch.before_step(batch)
    _spoilt(model)
    out["derivatives"] = _ended(lambda: watch.derivatives(random_direction(model)))
    losses = [score_coefficients(batch, torch.ones(len(batch), dtype=torch.float64))]
    mine = sharing.my_sequences(batch.prompt_index)
    out["gradients of losses"] = _ended(lambda: _loss_gradients(model, batch, losses, mine, sharing))
    return out


def _out_of_room() -> dict[str, tuple[str, float]]:
    """Derivatives that end in torch's own kind of error in process 1 alone."""
    sharing, batch, out = Processes.world(), _batch(), {}
    model = DistanceAttention(VOCABULARY).double()
    watch = EntropyWatch(CONFIG, model, sharing)
    watch.before_step(batch)

    def fail(*_: object) -> None:
        raise RuntimeError("not enough memory")

    if sharing.rank == 1:
        model.head.register_forward_pre_hook(fail)
    direction = random_direction(model)
    out["of a watched step"] = _ended(lambda: watch.derivatives(direction))
    said: list[str] = []
    check = DerivativeCheck(model, sharing, said.append)
    assert watch.seen is not None
    coefficients = score_coefficients(batch, torch.ones(len(batch), dtype=torch.float64))
    _, ones = _ended(lambda: check.hold(1.0, watch.seen, lambda: coefficients, direction))
    out["of the check"] = said[0].partition(": ")[2], ones
    return out


def _sharded_passes() -> tuple[str, float]:
    model = _spoilt(DistanceAttention(VOCABULARY).double())
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.query, model.head, model):
        fully_shard(module, mesh=mesh)
    return _ended(lambda: EntropyWatch(CONFIG, model, Processes.world()).look(_batch(), with_hidden=True))


def test_numbers_that_are_not_finite_in_one_process_are_refused_by_all() -> None:
    first, second = in_two_processes(_passes, patience=20)
    for name in second:
        assert first[name][1] == second[name][1] == 2.0, name
        assert first[name][0].startswith("another process") and "well" not in second[name][0], name
        assert not second[name][0].startswith("another process"), name


def test_an_error_of_torch_in_one_process_is_told_to_all() -> None:
    first, second = in_two_processes(_out_of_room, patience=20)
    for name in second:
        assert first[name][0].startswith("another process") and "not enough memory" in second[name][0], name
        assert first[name][1] == second[name][1] == 2.0, name


def test_also_where_a_pass_is_itself_an_exchange() -> None:
    first, second = in_two_processes(_sharded_passes, patience=20)
    assert first[0].startswith("another process") and not second[0].startswith("another process")
    assert first[1] == second[1] == 2.0


# ------------------------------------------------------------------ the order of sums
class TwoExperts(nn.Module):
    """Each micro-batch passes through one of two layers of the same shape, as a mixture's tokens may."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, expert: int):
        logprobs = self.experts[expert](x).log_softmax(-1)
        return type("Output", (), {"log_probs": logprobs[..., 0], "entropy": -(logprobs.exp() * logprobs).sum(-1)})()


def _score_terms() -> dict[str, Tensor]:
    """Each expert's part of the loss gradient; alone, all processes' micro-batches in one."""
    sharing, model = Processes.world(), TwoExperts()
    term = FusedScoreTerm(model, 2, sharing)
    for rank in range(2):
        if sharing.size > 1 and rank != sharing.rank:
            continue
        for number, expert in enumerate((0, 1) if rank == 0 else (1, 0)):
            x = torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(10 * rank + number))
            term.begin([(rank, number)] * 2, torch.ones((2, 3), dtype=torch.bool))
            weights = torch.tensor([0.5, -1.0 - rank])
            (-(weights[:, None] * model(x, expert).log_probs).sum()).backward()
    return term.take().update.total()


def test_score_terms_are_summed_parameter_by_parameter_whichever_was_reached_first() -> None:
    alone = _score_terms()
    for found in in_two_processes(_score_terms, patience=20):
        for name, wanted in alone.items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.allclose(*alone.values(), atol=1e-2), "the test is blind to a mix-up"


@pytest.mark.parametrize("count", [1, 3])
def test_one_process_refuses_alone_as_before(count: int) -> None:
    watch = EntropyWatch(CONFIG, _spoilt(DistanceAttention(VOCABULARY).double()))
    with pytest.raises(ValueError, match="not finite|finite"):
        watch.look(_batch().select([2, 3, 0][:count]), with_hidden=True)
