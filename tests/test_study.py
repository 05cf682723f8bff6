"""The reference study: its numbers by hand, its arms against TRL's loss, and a page that is of the rows beside it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trl import GRPOTrainer

from benchmarks.study import arms, runs, smollm2, summary, tasks
from benchmarks.study import page as study_page
from benchmarks.study.arms import ARMS, make_trainer
from benchmarks.study.covariance import CovarianceTrainer
from benchmarks.study.foretold import section
from benchmarks.study.leaving_out import LeavingOutTrainer
from benchmarks.study.measure import _pass_at
from benchmarks.study.summary import distance, load, paired
from benchmarks.study.tasks import right
from entropy_core.uncertainty import Estimate
from tests.rl_training.integrations import test_trl_integration
from tests.shared_artefacts import made_once
from tests.tiny_policy import save_tiny_policy


def test_numbers() -> None:
    rows = [{"step": s, "entropy": e} for s, e in ((0, 9.0), (50, 0.5), (100, 0.3))]
    assert distance({"target": 0.4, "rows": rows}) == pytest.approx(0.1)
    assert right(["1+2=3.", "4", "no"], ["3", "-4", "1"]) == [1.0, 0.0, 0.0]
    assert _pass_at(np.array([1, 0]), 4, 2) == pytest.approx((1 - 3 / 6) / 2)
    values = {s: {"x": v} for s, v in enumerate((1.0, 2.0, 3.0))}
    zeros = {s: {"x": 0.0} for s in range(4)}
    found = paired(values, zeros, "x")
    assert found["seeds"] == 3 and found["mean"] == pytest.approx(2.0)
    assert found["high"] - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert study_page._interval(found) == f" ({found['low']:+.3f} to {found['high']:+.3f})"
    assert study_page._interval(paired(zeros, zeros, "x")) == " (in every seed)", "equal differences are no certainty"
    assert math.isnan(paired({0: {"x": 1.0}}, zeros, "x")["low"])


def test_prices_beside_outcomes() -> None:
    """Differences to Dr. GRPO of the same seed, rows by their part; what is not priced is foretold to change nothing."""

    def run(arm: str, seed: int, entropy: float) -> dict:
        rows = [{"step": 300, "entropy": entropy, "reward": 1 - entropy}]
        last = {"entropy": entropy, "reward": 1 - entropy, "pass_at_4": 0.0, "pass_at_16": 0.0, "distinct": 0.0}
        return {"task": "x", "arm": arm, "seed": seed, "target": 0.3, "rows": rows, "last": last}

    entropies = {"dr_grpo": 0.2, "controller": 0.4, "bonus": 0.3, "rloo": 0.2, "clip_cov": 0.25}
    stored = [run(arm, seed, entropy) for arm, entropy in entropies.items() for seed in (0, 1)]
    rows = {"entropy_bonus_that_holds": [0.01, -0.02], "entropy_bonus_0.01": [0.002, -0.001], "clip_cov": [0.1, None]}
    lines = section(stored, {"0": rows, "1": rows, "7": rows})
    assert "over the 4 arms (95% interval): entropy 1.00 (1.00 to 1.00)" in lines[0]
    assert "| bonus | entropy_bonus_0.01, × 2.5 | 2 | +5.0e-03 | -2.5e-03 | +0.100 | -0.100 |" in lines
    assert "| clip_cov | clip_cov, × 0.01 | 2 | +1.0e-03 | +0.0e+00 | +0.050 | -0.050 |" in lines
    assert "| rloo | 0 | 2 | +0.0e+00 | +0.0e+00 | +0.000 | +0.000 |" in lines


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory):
    return made_once(tmp_path_factory, "tiny_policy", lambda root: save_tiny_policy(root / "policy"))


@pytest.fixture
def tiny_task(tiny_policy, tmp_path, monkeypatch):
    """The study on a random policy, with few prompts and looks."""

    def make(folder):
        if not folder.exists():
            shutil.copytree(tiny_policy, folder)
            lines = [json.dumps({"prompt": f"{a}+{b}", "answer": str(a + b)}) for a in range(60) for b in range(40)]
            (folder / "problems.jsonl").write_text("\n".join(lines))
        return folder

    monkeypatch.setitem(tasks.TASKS, "tiny", tasks.Task("tiny", 4, 4.3, make))
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(study_page, "ROOT", tmp_path)
    monkeypatch.setattr(study_page, "RESULTS", tmp_path / "results")
    for name, value in (("EVERY", 2), ("PROMPTS", 8), ("LAST_PROMPTS", 4)):
        monkeypatch.setattr(runs, name, value)
    return "tiny"


@pytest.mark.long
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_is_stored_once(tiny_task, arm) -> None:
    path = runs.run(tiny_task, arm, 0, 4)
    stored = json.loads(path.read_text())
    assert [row["step"] for row in stored["rows"]] == [0, 2, 4] and stored["last"].keys() >= {"pass_at_16", "distinct"}
    assert len(stored["logged"]["entropy"]) == 4
    assert ("entropy_controller/alpha" in stored["logged"]) == (arm == "controller")
    assert ("entropy_coef" in stored["logged"]) == (arm in ("adaptive", "bonus"))
    before = path.stat().st_mtime_ns
    assert runs.run(tiny_task, arm, 0, 4) == path and path.stat().st_mtime_ns == before


def test_the_page_says_what_the_runs_are(tiny_task, monkeypatch) -> None:
    monkeypatch.setattr(study_page, "STEPS", 4)
    monkeypatch.setattr(summary, "FROM", 2)
    for arm, seed in (("controller", 0), ("dr_grpo", 0), ("dr_grpo", 1)):
        runs.run(tiny_task, arm, seed, 4)
    study_page.write_page()
    rows = load(study_page.RESULTS / "runs.jsonl")
    text = (study_page.RESULTS / "README.md").read_text()
    ours = next(run for run in rows if run["arm"] == "controller")
    assert f"| controller (ours) | 1 | {distance(ours):.3f} |" in text and "| Dr. GRPO | 2 |" in text
    assert "nan" not in text, "one common seed has no interval"
    assert "| Dr. GRPO | 1 | +0.000 |" in text.replace("-0.000", "+0.000")
    assert (study_page.RESULTS / "tiny.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_covariance_arms_are_trls_loss_but_for_the_tokens_chosen(tiny_policy, tmp_path, monkeypatch, kind) -> None:
    """With no token chosen the run is TRL's own; with tokens chosen it is another."""
    settings = {"loss_type": "dr_grpo", "scale_rewards": "none", "learning_rate": 1e-3, "steps_per_generation": 2}
    make = test_trl_integration.make_trainer

    def trained(folder: str, trainer_class: type) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(test_trl_integration, "GRPOTrainer", trainer_class)
        trainer = make(tiny_policy, tmp_path / folder, **settings)
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    ours = trained("ours", CovarianceTrainer.of(kind))
    nothing = type("nothing", (CovarianceTrainer.of(kind),), {"_clipped": _none, "_penalty": _zero})
    without, own = trained("none", nothing), trained("own", _own_trainer())
    assert all(torch.allclose(without[name], own[name], rtol=0, atol=1e-7) for name in own)
    assert any(not torch.allclose(ours[name], own[name], rtol=0, atol=1e-6) for name in own)


def test_effects_of_leaving_out_are_those_of_real_steps(tiny_task, tmp_path, monkeypatch) -> None:
    """r_i against AdamW steps in which a sequence weighs a thousandth less, moments and clipping included.

    A large epsilon keeps the step smooth where a gradient is next to nothing.
    """
    monkeypatch.setattr(arms, "right", lambda completions, **_: [float(len(text) % 2) for text in completions])
    task = tasks.TASKS[tiny_task]
    trainer = make_trainer(ARMS["leave_out"], task, 0, 4, tmp_path / "run", max_grad_norm=0.01, adam_epsilon=1e-4)
    trainer.model.double()
    generator = torch.Generator().manual_seed(3)
    towards = {n: torch.randn(p.shape, generator=generator).double() for n, p in trainer.model.named_parameters()}
    trainer._held_out = lambda: (Estimate(4.0, 0.1, 9), towards)  # below the target of 4.3
    seen = []

    def checked(model, inputs):
        effects, missing = LeavingOutTrainer.effects(trainer, model, inputs)
        if (
            trainer.state.global_step == 2
        ):  # the first of a generation: ratios are 1; moments of two steps stand behind it
            weights = inputs["advantages"]
            whole = _change(trainer, {**inputs, "advantages": weights}, towards)
            for i in weights.abs().argsort(descending=True)[:3].tolist():
                lighter = weights.clone()
                lighter[i] *= 1 - 1e-3
                seen.append(
                    (float(effects[i]), (whole - _change(trainer, {**inputs, "advantages": lighter}, towards)) * 1e3)
                )
        return effects, missing

    trainer.effects = checked
    trainer.train()
    assert len(seen) == 3 and all(abs(closed) > 1e-9 for closed, _ in seen)
    assert all(closed == pytest.approx(real, rel=0.02) for closed, real in seen), seen
    assert 0 < max(trainer.state.log_history[k]["left_out/sequences"] for k in range(4)) <= 8


def _change(trainer, inputs, towards) -> float:
    """<towards, step> in float64 of the AdamW step that these inputs would make; nothing is moved."""
    model = trainer.model
    loss = GRPOTrainer._compute_loss(trainer, model, inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [g.double() for g in torch.autograd.grad(loss, parameters)]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    clip = min(1.0, trainer.args.max_grad_norm / float(norm + 1e-6))
    optimizer, total = trainer.optimizer.optimizer, 0.0
    for name, p, g in zip(names, parameters, gradients, strict=True):
        group = next(group for group in optimizer.param_groups if any(p is other for other in group["params"]))
        state, (b1, b2), g = optimizer.state[p], group["betas"], clip * g
        t = int(state["step"]) + 1
        m = b1 * state["exp_avg"].double() + (1 - b1) * g
        v = b2 * state["exp_avg_sq"].double() + (1 - b2) * g * g
        step = -group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        total += float((towards[name].double() * step).sum())
    return total


def _none(_self, _covariance, mask):
    return torch.zeros_like(mask)


def _zero(_self, _inputs, _mask):
    return torch.zeros(())


def _own_trainer():
    from trl import GRPOTrainer

    return GRPOTrainer


def test_documents_quote_the_stored_figures() -> None:
    """Correlations of prices with outcomes, and of a ledger's shares with runs without the group."""
    root = Path(__file__).resolve().parents[1]
    stored = (root / "benchmarks/results/study/README.md").read_text()
    told = re.search(r"entropy (0\.\d\d \(\S+ to \S+\)), reward (0\.\d\d \(\S+ to \S+\))\.", stored)
    assert told is not None
    study = (root / "docs/study/index.md").read_text()
    assert all(figure in study for figure in told.groups()), told.groups()
    guide = (root / "docs/guides/my-entropy-collapses.md").read_text()
    assert all(figure.replace("(", "[").replace(" to ", ", ").replace(")", "]") in guide for figure in told.groups())
    real = json.loads(smollm2.RESULTS.read_text())
    away = [f"{smollm2.distance(one):.2f}" for one in real if one["arm"] != "dr_grpo"]
    assert all(
        figure in text for figure in away for text in (study, (root / "docs/guides/holding-entropy.md").read_text())
    )
    ends = ", ".join(f"{one['rows'][-1]['reward']:.2f}" for one in real)
    assert f"Rewards end at {' and '.join(ends.rsplit(', ', 1))}" in study
    ledger = re.search(
        r"\*\*Score: (0\.\d\d \[\S+, \S+\])\*\*", (root / "benchmarks/results/ledger/README.md").read_text()
    )
    assert ledger is not None and ledger[1] in (root / "docs/analyses/ledger.md").read_text()
