"""Entropy and shares split by how completions ended and by the sign of their advantage, against plain loops."""

from __future__ import annotations

import pytest
import torch

from entropy_core.batch import SequenceBatch
from entropy_core.scores import TokenStatistics
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.probe.observation import Observation
from rl_training.probe.splits import batch_endings, entropy_by_ending, shares_by_group
from rl_training.prompts.endings import ending
from tests.rl_training.generation.test_drawn_tokens import with_environment
from tests.rl_training.integrations.test_trl_integration import logged, make_trainer

EOS = (1, 9)


@pytest.mark.parametrize(
    ("ids", "drawn", "kind"),
    [
        ([5, 1], None, "ended"),
        ([5, 9], (True, True), "ended"),
        ([1, 5], None, "truncated"),
        ([5, 7, 1], (True, False, True), "ended"),
        ([5, 1], (True, False), "environment"),
        ([5, 6], (True, False), "environment"),
    ],
)
def test_how_a_completion_came_to_its_end(ids: list[int], drawn, kind: str) -> None:
    assert ending(ids, drawn, EOS) == kind
    batch = SequenceBatch.from_sequences([[3], [3, 4, 4]], [ids, [5, 1]], [0, 1], 0, drawn=[drawn, None])
    assert batch_endings(batch, EOS) == [kind, "ended"], "padding was taken for an end"


def test_entropies_of_groups_are_weighted_over_their_own_tokens() -> None:
    completions, drawn = [[5, 1], [5, 6], [5, 6, 6], [5, 8]], [None, None, None, (True, False)]
    batch = SequenceBatch.from_sequences([[3]] * 4, completions, [0] * 4, 0, drawn=drawn)
    entropies = torch.arange(batch.input_ids.numel()).view(batch.input_ids.shape).double() * batch.completion_mask
    logs = torch.tensor([0.0, 1.0, 0.5, -1.0])
    seen = Observation(batch, TokenStatistics(entropies, entropies), logs)
    omega = torch.softmax(logs.double(), 0)
    found = entropy_by_ending(seen, EOS)
    cut = float((omega[1:3] * entropies.sum(1)[1:3]).sum() / (omega[1:3] * batch.completion_lengths[1:3]).sum())
    assert found["entropy_truncated"] == pytest.approx(cut)
    assert found["entropy_ended"] == pytest.approx(float(entropies[0].sum()) / 2)
    assert found["entropy_environment"] == pytest.approx(float(entropies[3].sum()))
    shares = [found[f"{kind}_share"] for kind in ("ended", "truncated", "environment")]
    assert shares == pytest.approx([float(omega[0]), float(omega[1] + omega[2]), float(omega[3])])
    plain = entropy_by_ending(Observation(batch.select([0]), TokenStatistics(entropies[:1], entropies[:1]), None), EOS)
    assert plain == {"entropy_ended": plain["entropy_ended"], "ended_share": 1.0, "truncated_share": 0.0}


def test_shares_of_groups_add_up() -> None:
    shares = torch.tensor([1.0, -2.0, 4.0, 8.0])
    found = shares_by_group(shares, ["ended", "truncated", "ended", "environment"], [0.5, -0.5, 0.0, 2.0])
    assert found == {
        "share_ended": 5.0, "share_truncated": -2.0, "share_environment": 8.0,
        "share_positive": 9.0, "share_negative": -2.0, "share_zero": 4.0,
    }  # fmt: skip


def test_the_probe_logs_them_and_they_add_up_to_the_whole(tiny_policy, tmp_path) -> None:
    trainer = with_environment(make_trainer(tiny_policy, tmp_path, loss_type="dr_grpo", max_completion_length=12))
    config = EntropyProbeConfig(preset="accurate", on_error="raise", eval_sequences=16, mode="attribution")
    callback = attach_entropy_probe(trainer, config, console=False)
    trainer.train()
    entries = logged(trainer)
    kinds = ("ended", "truncated", "environment")
    assert any("entropy_environment" in e for e in entries) and any("entropy_truncated" in e for e in entries)
    for entry, change in zip(entries, callback.history, strict=True):
        assert sum(entry.get(f"{kind}_share", 0.0) for kind in kinds) == pytest.approx(1.0)
        low, high = (f(entry[f"entropy_{k}"] for k in kinds if f"entropy_{k}" in entry) for f in (min, max))
        assert low - 1e-6 <= entry["entropy"] <= high + 1e-6
        total = float(change.shares.sum())
        for names in (kinds, ("positive", "negative", "zero")):
            size = float(change.shares.abs().sum())
            assert sum(entry.get(f"share_{n}", 0.0) for n in names) == pytest.approx(total, abs=1e-6 * size)
