"""Two same-shaped entries of optimizer.pt that changed places, and entries that are missing: refused or named, and never in a
checkpoint that is right.
"""

import json
import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from entropy_experiments.checkpoint_loader import Checkpoint, load_checkpoint
from entropy_experiments.checkpoints.exchanged_entries import _Fit, _outstanding
from entropy_experiments.checkpoints.missing_entries import checkpoint_preconditioner, refuse_missing_entries
from entropy_experiments.checkpoints.optimizer_names import rebuild_parameter_names
from entropy_experiments.console.doctor import diagnose, examine
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.step.optimizer_step import take_next_step
from rl_training.errors import UserError
from rl_training.run.sidecar import SIDECAR_NAME
from rl_training.train import run_training
from tests.entropy_experiments.checkpoint_edits import edit_optimizer
from tests.entropy_experiments.checkpoint_zoo import lora, plain_checkpoint
from tests.entropy_experiments.small_analysis import config
from tests.tiny_policy import tiny_train_config

pytestmark = pytest.mark.filterwarnings("ignore:.*not verified")
MODULES = "all-linear"
SAMPLING = ("entropy_analysis.sampling.temperature=1.0", "entropy_analysis.sampling.max_completion_length=8")


def exchange(checkpoint: Path, one: str, other: str) -> None:
    """Let the entries of two parameters of a plain checkpoint change places."""
    names = [name for group in names_of(load_checkpoint(checkpoint, device="cpu")) for name in group]
    a, b = (next(k for k, name in enumerate(names) if part in name) for part in (one, other))

    def change(state: dict[str, Any]) -> None:
        assert state["state"][a]["exp_avg"].shape == state["state"][b]["exp_avg"].shape
        state["state"][a], state["state"][b] = state["state"][b], state["state"][a]

    edit_optimizer(checkpoint, change)


def names_of(checkpoint: Checkpoint) -> list[list[str]]:
    return rebuild_parameter_names(checkpoint.model)


@pytest.mark.parametrize(
    ("rank", "steps", "one", "other"),
    [
        (4, 3, "0.self_attn.q_proj.lora_B", "1.self_attn.o_proj.lora_B"),
        (8, 2, "0.mlp.up_proj.lora_B", "0.mlp.gate_proj.lora_B"),
        (16, 12, "0.self_attn.q_proj.lora_A", "1.self_attn.k_proj.lora_A"),
        (16, 12, "0.self_attn.v_proj.lora_B", "1.self_attn.v_proj.lora_B"),
    ],
)
def test_exchanged_factors_are_refused_before_any_pass(
    tiny_run: Path, tmp_path: Path, rank: int, steps: int, one: str, other: str
) -> None:
    adapter = lora(r=rank, target_modules=MODULES)
    path = plain_checkpoint(tmp_path / "plain", tiny_run.parent / "policy", adapter, steps=steps)
    exchange(path, one, other)
    with pytest.raises(UserError, match="have changed places") as refused:
        load_checkpoint(path, device="cpu")
    assert one in str(refused.value) and other in str(refused.value)
    row = diagnose(path)
    assert row.verdict == "without Adam" and any("changed places" in line for line in row.remedies)
    assert load_checkpoint(path, device="cpu", require_optimizer=False).optimizer is None


@pytest.mark.long
@pytest.mark.parametrize(("rank", "steps"), [(1, 5), (4, 1), (4, 25), (32, 8)])
def test_right_factors_are_never_refused(tiny_run: Path, tmp_path: Path, rank: int, steps: int) -> None:
    """Whatever two are exchanged, they are named or nothing is: never others."""
    adapter = lora(r=rank, target_modules=MODULES)
    path = plain_checkpoint(tmp_path / "plain", tiny_run.parent / "policy", adapter, steps=steps)
    checkpoint = load_checkpoint(path, device="cpu")
    assert checkpoint.optimizer is not None
    state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
    names = [name for group in names_of(checkpoint) for name in group]
    pairs = [
        p for p in combinations(range(len(names)), 2) if state[p[0]]["exp_avg"].shape == state[p[1]]["exp_avg"].shape
    ]
    for a, b in pairs[:: len(pairs) // 4]:
        edit_optimizer(path, swap := swapped(a, b))
        try:
            load_checkpoint(path, device="cpu")
        except UserError as error:
            assert repr(names[a]) in str(error) and repr(names[b]) in str(error)
        edit_optimizer(path, swap)


def test_a_cosine_of_few_numbers_is_no_evidence() -> None:
    """As seen in a right checkpoint of rank 4 after three steps: 0.43 over 16 numbers, other pairs about 0."""
    others = [_Fit((f"a{k}", f"b{k}"), 0.01 * (k % 5), 0.4, 0) for k in range(18)]
    for numbers, found in ((16, None), (64, None), (256, ("one", "other"))):
        assert _outstanding([_Fit(("one", "other"), 0.43, 0.18, numbers), *others]) == found


def swapped(a: int, b: int) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state["state"][a], state["state"][b] = state["state"][b], state["state"][a]

    return change


@pytest.fixture(scope="module")
def whole_model_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fully trained policy after ten steps, without a record; beside it no rollouts."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"lora": {"enabled": False}, "training": {"steps": 10, "save_every": 10}}
    run = run_training(tiny_train_config(tiny_run.parent / "policy", folder / "run", **settings), quiet=True)
    (run / "checkpoint-10" / SIDECAR_NAME).unlink()
    return Path(shutil.copytree(run / "checkpoint-10", folder / "plain" / "checkpoint-10"))


def task_of(tiny_run: Path) -> str:
    record = json.loads((tiny_run / "checkpoint-4" / SIDECAR_NAME).read_text())
    return f"checkpoint.task={json.dumps(record['task'])}"


@pytest.mark.long
def test_gradients_tell_exchanged_entries_of_a_whole_model(
    whole_model_run: Path, tiny_run: Path, tmp_path: Path
) -> None:
    settings = config(task_of(tiny_run), *SAMPLING)
    found = run_fisher_analysis(whole_model_run, settings, folder=tmp_path / "right", keep_going=True)
    entries = next(c for c in found.numbers.checks if c.name == "optimizer entries recognised")
    told = re.search(r"Of (\d+) pairs of parameters of one shape (\d+) have certainly not", entries.explanation)
    assert told is not None and 0.5 * int(told[1]) < int(told[2]) <= int(told[1])
    for one, other in (("0.mlp.up_proj", "1.mlp.gate_proj"), ("0.self_attn.q_proj", "1.self_attn.o_proj")):
        path = Path(shutil.copytree(whole_model_run, tmp_path / one / "checkpoint-10"))
        exchange(path, one, other)
        with pytest.raises(UserError, match="have changed places") as refused:
            run_fisher_analysis(path, settings, folder=tmp_path / "wrong", keep_going=True)
        assert one in str(refused.value) and other in str(refused.value)


def test_a_lost_entry_is_named_by_doctor_and_refused_by_analyze(
    whole_model_run: Path, tiny_run: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(whole_model_run, tmp_path / "checkpoint-10"))
    edit_optimizer(path, lambda state: state["state"].pop(3))
    name = names_of(load_checkpoint(path, device="cpu"))[0][3]
    lines, _ = examine(path)
    assert any(f"no entry for '{name}': right only if these never had a gradient" in line for line in lines)
    for preconditioning in ("checkpoint", "step"):
        settings = config(
            task_of(tiny_run), *SAMPLING,
            f"entropy_analysis.fisher_kernel.preconditioning={preconditioning}",
        )  # fmt: skip
        with pytest.raises(UserError, match=f"no entry for '{name}', which has a gradient"):
            run_fisher_analysis(path, settings, folder=tmp_path / "results", keep_going=True)


def test_what_never_had_a_gradient_is_left_alone_as_torch_leaves_it() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(2, 2)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(2):
            model["used"](torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = fresh()
    model["used"](torch.ones(1, 3)).square().sum().backward()
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    found = take_next_step(model, optimizer, gradient, None)
    refuse_missing_entries(found.state, gradient, "none")
    twin, its_optimizer = fresh()
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    twin["used"](torch.ones(1, 3)).square().sum().backward()
    its_optimizer.step()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(found.parameter_delta[name], p.detach() - before[name])
        torch.testing.assert_close(found.update.total()[name], p.detach() - before[name], atol=1e-6, rtol=1e-4)
    assert (
        not found.parameter_delta["idle.weight"].any() and float(found.step_preconditioner["idle.weight"].max()) < 1e-30
    )
    assert float(checkpoint_preconditioner(found.state, gradient)["idle.weight"].max()) < 1e-30
    gradient["idle.weight"] += 1.0
    with pytest.raises(UserError, match="no entry for 'idle.weight', which has a gradient"):
        refuse_missing_entries(found.state, gradient, "names")
    refuse_missing_entries(found.state, gradient, "digest")
    with pytest.raises(UserError, match="take entropy_analysis.fisher_kernel.preconditioning=step"):
        checkpoint_preconditioner(found.state, gradient)
