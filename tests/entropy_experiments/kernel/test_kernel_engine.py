"""Whatever the plan, the number of processes and the interruptions: the kernel is the same."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from entropy_core import kernel as core_kernel
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.gradients import gradient_rows
from entropy_core.kernel import compute_cross_fisher_kernel
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import Processes
from entropy_experiments.kernel.contraction import OtherMetric
from entropy_experiments.kernel.engine import Kernel, KernelEngine
from entropy_experiments.kernel.modules import chosen_parameters, only_trainable
from entropy_experiments.kernel.plan import KernelPlan, KernelSize, fixed_bytes, plan_kernel
from entropy_experiments.kernel.row_passes import RowPasses
from entropy_experiments.kernel.strategy import KernelSetup
from entropy_experiments.kernel.workspace import KernelWorkspace
from entropy_experiments.run.reporter import Reporter
from entropy_experiments.step.gradient_rows import KeptRows, RecomputedRows
from rl_training.errors import UserError
from tests.entropy_experiments.analyses.tiny_step import CASE, sample_batch
from tests.oracle.comparison import assert_close
from tests.two_processes import in_two_processes

PLANS = {
    "memory": KernelPlan("memory", 12, 5, 0, 0, 0, 0),
    "tiles": KernelPlan("tiles", 5, 4, 0, 0, 0, 0),
    "disk": KernelPlan("disk", 5, 7, 0, 10**9, 0, 0),
    "memory, stored too": KernelPlan("memory", 12, 5, 0, 10**9, 0, 0),
    "factored": KernelPlan("factored", 5, 7, 0, 0, 0, 0),
    "factored, stored": KernelPlan("factored", 5, 7, 0, 10**9, 0, 0),
}


def world():
    generator = torch.Generator().manual_seed(3)
    model = CASE.make(torch.float32)
    train, evaluation = sample_batch(model, 6, 2, generator), sample_batch(model, 17, 1, generator)
    p = {n: 0.5 + torch.rand(q.shape, generator=generator) for n, q in model.named_parameters() if q.requires_grad}
    return model, train, evaluation, p


class Pausing(Reporter):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def block(self, matrix: str, done: int, total: int) -> None:
        time.sleep(self.seconds)


def kernel(plan: KernelPlan, folder: Path | None, processes: Processes | None = None, pause: float = 0.0):
    """K1 and two extra columns, through the engine, which rests for `pause` seconds after each block."""
    model, train, evaluation, p = world()
    names = list(p)
    setup = KernelSetup(
        RowPasses(model, tuple(names), PassSettings(64)), train, plan, processes or Processes(),
        workspace=None if folder is None else KernelWorkspace(folder / "work"),
        store_folder=None if folder is None else folder / "gradients",
        reporter=Pausing(pause),
    )  # fmt: skip
    engine = Kernel(KernelEngine(setup).prepare(), p)
    steps = {name: torch.stack([p[name], 2 * p[name]]) for name in names}
    found = engine.contract("evaluation", evaluation, {"score": score_coefficients(evaluation)}, ("score",), steps)
    return None if found is None else [torch.cat([found.kernel["score"], found.steps["score"]], 1)]


def expected() -> Tensor:
    model, train, evaluation, p = world()
    return compute_cross_fisher_kernel(model, evaluation, train, p)


@pytest.mark.long
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_kernel(plan: str, tmp_path: Path) -> None:
    found = kernel(PLANS[plan], tmp_path)
    assert found is not None
    assert_close(found[0][:, :12], expected(), 1e-6, plan)
    assert_close(found[0][:, 13], 2 * found[0][:, 12], 1e-6, "steps are contracted as they are, without P")
    again = kernel(PLANS[plan], tmp_path)
    assert again is not None and torch.equal(again[0], found[0]), "read back from its blocks"


def _shared() -> list[Tensor]:
    out = []
    for plan in PLANS.values():
        folder = Path(os.environ["KERNEL_TEST_FOLDER"]) / plan.strategy / str(plan.disk)
        found = kernel(plan, folder, Processes.world())
        out.append(torch.zeros(0) if found is None else found[0])
    return out


@pytest.mark.long
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_several_processes_give_the_same_bits(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERNEL_TEST_FOLDER", str(tmp_path / "shared"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [kernel(plan, tmp_path / f"alone{k}") for k, plan in enumerate(PLANS.values())]
    finally:
        torch.set_num_threads(threads)
    for k, found in enumerate(in_two_processes(_shared, size)[0]):
        own = alone[k]
        assert own is not None
        assert_close(found, own[0], 1e-6, f"{list(PLANS)[k]}: {size} processes against one")


def _killed_at_random(plan: KernelPlan, folder: Path, size: int, kills: int, seed: int) -> int:
    """Start `size` processes, kill them all at a random moment, `kills` times over; how often they were really killed.

    The first time they rest for ever after their first block, so that at least one kill falls inside the work on a
    machine of any speed.
    """
    moments, killed = random.Random(seed), 0
    for kill in range(kills):
        meeting = tempfile.mkdtemp()
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    torch.set_num_threads(1)
                    if size > 1:
                        torch.distributed.init_process_group(
                            "gloo", init_method=f"file://{meeting}/point", rank=rank, world_size=size
                        )
                    kernel(plan, folder, Processes.world(), pause=0.01 if kill else 3600.0)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        time.sleep(moments.uniform(0.05, 0.6))
        for child in children:
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return killed


# The plan that keeps most between its blocks is killed in `make test`, the others in `make test-long`.
@pytest.mark.long
@pytest.mark.parametrize(
    ("plan", "size"),
    [
        ("tiles", 1), *(pytest.param(p, k, marks=pytest.mark.long) for p in ("memory", "tiles", "disk") for k in (1, 2)
                        if (p, k) != ("tiles", 1)),
    ],
)  # fmt: skip
def test_killed_ten_times_and_resumed_it_has_the_same_bits(plan: str, size: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        undisturbed = kernel(PLANS[plan], tmp_path / "quiet")
        kills = 10 if plan != "disk" else 5
        killed = _killed_at_random(PLANS[plan], tmp_path / "killed", size, kills, seed=size)
        resumed = kernel(PLANS[plan], tmp_path / "killed")
    finally:
        torch.set_num_threads(threads)
    assert killed > 0, "no process was killed while it worked"
    assert undisturbed is not None and resumed is not None
    assert torch.equal(resumed[0], undisturbed[0])


def test_only_unfinished_blocks_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(PLANS["tiles"], tmp_path)
    blocks = sorted((tmp_path / "work" / "evaluation").glob("*.npz"))
    before = {path: path.stat().st_mtime_ns for path in blocks}
    blocks[3].unlink()
    made: list[str] = []
    write = KernelWorkspace.write
    monkeypatch.setattr(
        KernelWorkspace,
        "write",
        lambda self, matrix, piece, block: (made.append(piece), write(self, matrix, piece, block)),
    )
    kernel(PLANS["tiles"], tmp_path)
    assert made == [blocks[3].stem]
    assert all(path.stat().st_mtime_ns == before[path] for path in blocks if path != blocks[3])


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    kernel(PLANS["memory"], tmp_path)
    block = sorted((tmp_path / "work" / "evaluation").glob("*.npz"))[1]
    content = bytearray(block.read_bytes())
    content[-200] ^= 1
    block.write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{block.name} is damaged"):
        kernel(PLANS["memory"], tmp_path)
    block.write_bytes(bytes(content[:100]))
    with pytest.raises(UserError, match=f"{block.name} is damaged"):
        kernel(PLANS["memory"], tmp_path)


def test_work_of_another_analysis_is_refused(tmp_path: Path) -> None:
    work = KernelWorkspace(tmp_path / "a.part" / "work")
    work.claim({"config": {"seed": 0, "sizes": [1, 2]}, "model": "x"})
    work.claim({"config": {"seed": 0, "sizes": [1, 2]}, "model": "x"})
    with pytest.raises(UserError, match=r"config.sizes\[1\] was 2, now it is 3"):
        work.claim({"config": {"seed": 0, "sizes": [1, 3]}, "model": "x"})


def test_rows_of_chosen_modules(tmp_path: Path) -> None:
    model, train, evaluation, p = world()
    names = chosen_parameters(model, ["*q_proj*"])
    assert names and len(names) < len(p)
    passes = RowPasses(model, tuple(names), PassSettings(64))
    engine = KernelEngine(KernelSetup(passes, train, PLANS["memory"]))
    found = Kernel(engine.prepare(), p).contract(
        "evaluation", evaluation, {"score": score_coefficients(evaluation)}, ("score",)
    )
    assert found is not None
    zeros = {name: q if name in names else torch.zeros_like(q) for name, q in p.items()}
    with only_trainable(model, names):
        reference = compute_cross_fisher_kernel(model, evaluation, train, {n: p[n] for n in names})
    assert_close(found.kernel["score"], reference, 1e-6, "kernel over some modules")
    assert passes.restricted and float(passes.restrict(p)[next(n for n in p if n not in names)].abs().sum()) == 0.0
    assert all(torch.equal(passes.restrict(p)[n], zeros[n]) for n in p)
    assert all(q.requires_grad for n, q in model.named_parameters() if n in p)
    with pytest.raises(UserError, match="nothing_like_it"):
        chosen_parameters(model, ["nothing_like_it"])


def test_rows_kept_and_rows_formed_anew_answer_alike() -> None:
    model, train, _, p = world()
    rows = KernelEngine(KernelSetup(RowPasses(model, tuple(p), PassSettings(64)), train, PLANS["memory"])).prepare()
    assert rows.columns is not None
    before = {name: part.clone() for name, part in rows.columns.items()}
    found = Kernel(rows, p).contract("own", train, {"score": score_coefficients(train)}, ("score",))
    assert found is not None and all(torch.equal(rows.columns[name], part) for name, part in before.items())
    weights = torch.linspace(-1, 1, len(train), dtype=torch.float64)
    kept, anew = KeptRows(rows.columns), RecomputedRows(model, train)
    for name, gradient in kept.weighted_gradient(weights).items():
        assert_close(anew.weighted_gradient(weights)[name], gradient, 1e-4, name)
    assert_close(anew.products(p), kept.products(p), 1e-4, "products")


@pytest.mark.parametrize("m, n", [(3, 5), (5, 3), (1, 1)])
def test_a_metric_between_rows_and_vectors_leaves_both_as_they_are(m: int, n: int, monkeypatch) -> None:
    """Whichever side is the smaller one, and whether the columns are one piece or several of unequal size."""
    generator = torch.Generator().manual_seed(m)
    rows, vectors = (torch.randn(count, 4, 7, generator=generator) for count in (m, n))
    metric = torch.rand(4, 7, generator=generator)
    expected = torch.einsum("mij,ij,nij->mn", rows.double(), metric.double(), vectors.double())
    for size in (2**18, 10, 1):
        monkeypatch.setattr(core_kernel, "_CPU_PIECE", size)
        before = rows.clone(), vectors.clone()
        assert_close(core_kernel.products(rows, vectors, metric), expected, 1e-6, f"pieces of {size}")
        assert torch.equal(rows, before[0]) and torch.equal(vectors, before[1])


@pytest.mark.parametrize("plan", ["memory", "tiles", "disk"])
def test_products_are_of_the_kinds_that_were_asked_for(plan: str, tmp_path: Path) -> None:
    """Kernel, steps and other metrics side by side, each held against the rows themselves."""
    model, train, evaluation, p = world()
    setup = KernelSetup(
        RowPasses(model, tuple(p), PassSettings(64)), train, PLANS[plan], workspace=KernelWorkspace(tmp_path / "work"),
        store_folder=tmp_path / "gradients",
    )  # fmt: skip
    score = score_coefficients(evaluation)
    rows = {"score": score, "own_tokens": TokenCoefficients(score.logprob, score.entropy)}
    steps, other = {name: torch.stack([part, -part]) for name, part in p.items()}, {n: q.square() for n, q in p.items()}
    kernel = Kernel(KernelEngine(setup).prepare(), p)
    others = (OtherMetric(other, ("own_tokens",)), OtherMetric(p, ("score", "own_tokens")))
    found = kernel.contract("one", evaluation, rows, ("score",), steps, others)
    assert found is not None
    left = {kind: gradient_rows(model, evaluation, c) for kind, c in rows.items()}
    right = gradient_rows(model, train, score_coefficients(train))

    def reference(kind: str, metric: dict[str, Tensor], columns: dict[str, Tensor]) -> Tensor:
        return sum((left[kind][n] * metric[n]).flatten(1) @ columns[n].flatten(1).T for n in p)

    ones = {name: torch.ones_like(part) for name, part in p.items()}
    assert set(found.kernel) == {"score"} and set(found.steps) == set(rows)
    kinds = [set(one) for one in found.others]
    assert kinds == ([{"own_tokens"}, {"score", "own_tokens"}] if plan == "memory" else []), (
        "answered where rows are kept"
    )
    assert_close(found.kernel["score"], reference("score", p, right), 1e-5, "kernel")
    for kind in rows:
        assert_close(found.steps[kind], reference(kind, ones, steps), 1e-5, f"steps of {kind}")
    for one, metric in zip(found.others, (other, p), strict=False):
        for kind, matrix in one.items():
            assert_close(matrix, reference(kind, metric, right), 1e-5, "another metric")
    alone = kernel.contract("two", evaluation, rows, (), steps)
    assert alone is not None and not alone.kernel
    assert_close(alone.steps["score"], found.steps["score"], 1e-6, "steps alone")


# ---- the plan


def test_the_first_plan_that_fits_is_taken() -> None:
    size = KernelSize(n_eval=10_000, n_train=10_000, parameters=5_000_000)
    gib = 2**30
    assert plan_kernel(size, 300 * gib).strategy == "memory"
    disk = plan_kernel(size, 7 * gib, 200 * gib)
    assert (disk.strategy, disk.passes, disk.disk) == ("disk", 20_000, 10_000 * 20_000_000)
    assert disk.memory + fixed_bytes(size) <= 7 * gib
    tiles = plan_kernel(size, 7 * gib)
    assert tiles.strategy == "tiles" and tiles.disk == 0
    assert tiles.memory + fixed_bytes(size) <= 7 * gib
    assert tiles.passes == 10_000 + -(-10_000 // tiles.tile) * 10_000
    half = plan_kernel(KernelSize(10_000, 10_000, 5_000_000, storage="bfloat16"), 7 * gib, 110 * gib)
    assert half.strategy == "disk" and half.disk == 10_000 * 10_000_000


def test_budgets_that_are_too_small_say_what_is_needed() -> None:
    size = KernelSize(n_eval=100, n_train=100, parameters=5_000_000)
    with pytest.raises(UserError, match=r"too small for one row a side: .*takes 0\.\d+ GiB; raise .*memory_budget"):
        plan_kernel(size, 100_000_000)
    with pytest.raises(UserError, match="gradient store takes .* disk_budget is 1 GiB"):
        plan_kernel(size, 2**40, 2**30, save_gradients=True)
    with pytest.raises(UserError, match="all training rows take"):
        plan_kernel(size, 2**30, strategy="memory")
    with pytest.raises(UserError, match="strategy=tiles keeps no rows"):
        plan_kernel(size, 2**40, 2**40, save_gradients=True, strategy="tiles")


def test_what_is_held_beside_the_rows_counts() -> None:
    """A shard of both kinds while it is stored, and one parameter's rows of a block."""
    size, gib = KernelSize(n_eval=100, n_train=100, parameters=5_000_000), 2**30
    row, exact = size.row_bytes, fixed_bytes(size, "memory") + 101 * size.row_bytes
    assert plan_kernel(size, exact, 100 * gib).strategy == "memory"
    assert plan_kernel(size, exact - 1, 100 * gib).strategy == "disk"
    assert plan_kernel(size, exact + 63 * row, 100 * gib, save_gradients=True).strategy == "disk"
    stored = plan_kernel(size, exact + 64 * row, 100 * gib, save_gradients=True)
    assert (stored.strategy, stored.memory, stored.disk) == ("memory", 164 * row, 300 * row)
    large = KernelSize(n_eval=100, n_train=100, parameters=5_000_000, largest=1_000_000)
    assert fixed_bytes(large) - fixed_bytes(size) == 32 * 4_000_000
    assert plan_kernel(large, exact, 100 * gib).strategy == "disk"
