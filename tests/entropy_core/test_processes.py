"""One class for processes that share work: what each computes, what all know afterwards, and errors of the first in all."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from entropy_core.processes import ALONE, Processes
from tests.two_processes import in_two_processes


class WithItsOwnWords(ValueError):
    """A picklable error of a library."""


class AsksForMore(RuntimeError):
    """Cannot be made again from its arguments."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def _failing(error: Exception):
    def make() -> None:
        raise error

    return make


def _everything() -> dict[str, object]:
    entered: list[str] = []

    @contextmanager
    def explaining():
        entered.append("exchange")
        yield

    waiting = dist.new_group(timeout=timedelta(minutes=5), backend="gloo")
    out: dict[str, object] = {}
    for name, group in {
        "plain": Processes.world(),
        "waiting": Processes(dist.group.WORLD, waiting, explaining),
    }.items():
        sent = torch.full((2,), float(group.rank + 1))
        group.meet()
        group.send_around(sent, owner=1)
        out[name] = (
            group.size,
            group.is_root,
            group.mine(range(5)),
            group.my_sequences(torch.tensor([7, 7, 3, 9, 3])).tolist(),
            float(group.sum(torch.tensor(group.rank + 1.0))),
            group.any(group.rank == 1, torch.device("cpu")),
            sent.tolist(),
            group.from_root(lambda group=group: f"of process {group.rank}"),
        )
        for error in (WithItsOwnWords("no such folder"), AsksForMore("here", "broken")):
            with pytest.raises(Exception) as raised:
                group.from_root(_failing(error))
            out[f"{name}, {type(error).__name__}"] = (type(raised.value).__name__, str(raised.value))
    out["exchanges explained"] = len(entered)
    return out


def test_two_processes_share_work_and_the_roots_errors() -> None:
    first, second = in_two_processes(_everything)
    for name in ("plain", "waiting"):
        assert first[name] == (2, True, [0, 2, 4], [2, 3, 4], 3.0, True, [2.0, 2.0], "of process 0")
        assert second[name] == (2, False, [1, 3], [0, 1], 3.0, True, [2.0, 2.0], "of process 0")
        for found in (first, second):
            assert found[f"{name}, WithItsOwnWords"] == ("WithItsOwnWords", "no such folder")
        assert first[f"{name}, AsksForMore"] == ("AsksForMore", "here: broken")
        assert second[f"{name}, AsksForMore"] == ("RuntimeError", "AsksForMore: here: broken")
    # meet, send, sum and any (each of which meets first), from_root three times
    assert first["exchanges explained"] == second["exchanges explained"] == 1 + 1 + 2 + 2 + 3


def test_alone_nothing_is_sent() -> None:
    values = torch.ones(2)
    assert (ALONE.rank, ALONE.size, ALONE.is_root) == (0, 1, True)
    assert ALONE.mine(range(3)) == [0, 1, 2] and ALONE.my_sequences(torch.tensor([5, 1])).tolist() == [0, 1]
    assert ALONE.sum(values) is values and ALONE.from_root(lambda: 3) == 3
    assert Processes.world().size == 1
    with pytest.raises(WithItsOwnWords, match="at once"):
        ALONE.from_root(_failing(WithItsOwnWords("at once")))
