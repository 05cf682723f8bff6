"""Two gloo processes watch what one does: each some of the prompts, and under lockstep with as many forward passes each."""

from __future__ import annotations

import torch

from tests.oracle.comparison import assert_close
from tests.rl_training.shared_watch import all_that_is_watched, watched_under_fully_shard
from tests.two_processes import in_two_processes


def test_two_processes_watch_what_one_does():
    alone, (first, second) = all_that_is_watched(), in_two_processes(all_that_is_watched)
    for setting, wanted in alone.items():
        assert torch.equal(first[setting]["said"].nan_to_num(), second[setting]["said"].nan_to_num()), setting
        assert_close(
            first[setting]["said"].nan_to_num(),
            wanted["said"].nan_to_num(),
            1e-5,
            f"{setting}: differs from one process",
        )
        calls = [found[setting]["calls"] for found in (first, second)]
        assert setting.startswith("shared") or torch.equal(*calls), (
            f"{setting}: a forward that one process does not make hangs"
        )
    calls = [found["shared, one prompt"]["calls"] for found in (first, second)]
    assert not torch.equal(*calls), "the test is blind to a process without a prompt"


def test_weights_that_two_processes_share_are_watched_as_one_process_watches_them():
    """FSDP2: the pass after a step must see the weights after it, which the outermost module would not gather again."""
    whole = watched_under_fully_shard()
    for found in in_two_processes(watched_under_fully_shard):
        assert_close(found, whole, 1e-5, "differs from one process")
    assert bool((whole[:, 1].abs() > 1e-3).all()), "the steps do too little to tell"
