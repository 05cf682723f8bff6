"""Kernels from factors of rows: the store on disk, the plan that chooses them, whole analyses that come to the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core import factored_rows
from entropy_core.entropy import TokenCoefficients, score_coefficients
from entropy_core.gradients import gradient_rows, trainable_parameters
from entropy_core.passes.settings import PassSettings
from entropy_experiments.fisher_analyzer import FisherComputation, analyze_batches
from entropy_experiments.kernel import options as kernel_options
from entropy_experiments.kernel.engine import Kernel, KernelEngine
from entropy_experiments.kernel.factor_sizes import FactorSizes, Lengths, factor_sizes
from entropy_experiments.kernel.factored import Factored
from entropy_experiments.kernel.options import KernelOptions, describe_plan
from entropy_experiments.kernel.plan import KernelPlan, KernelSize, fixed_bytes, plan_kernel
from entropy_experiments.kernel.row_passes import RowPasses
from entropy_experiments.kernel.store import factor_store
from entropy_experiments.kernel.store.factor_store import FactorStore
from entropy_experiments.kernel.strategy import KernelSetup
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from entropy_experiments.kernel.workspace import KernelWorkspace
from entropy_experiments.step.settings import AnalysisSettings
from rl_training.errors import UserError
from tests.entropy_core.test_factored_rows import SHAPE, llama, lora, sequences
from tests.oracle.comparison import assert_close

GIB = 2**30


def setup_of(model: nn.Module, folder: Path, shard: int = 3) -> KernelSetup:
    names = tuple(trainable_parameters(model))
    plan = KernelPlan("factored", shard, 4, 0, GIB, 0, 0)
    passes = RowPasses(model, names, PassSettings(40))
    return KernelSetup(passes, sequences(7, 2), plan, workspace=KernelWorkspace(folder / "work"))


def product(model: nn.Module, folder: Path) -> torch.Tensor:
    evaluation = sequences(6, 1)
    kernel = Kernel(KernelEngine(setup_of(model, folder)).prepare(), None)
    found = kernel.contract("evaluation", evaluation, {"score": score_coefficients(evaluation)}, ("score",))
    assert found is not None
    return found.kernel["score"]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_read_is_what_was_written(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and rows of the store, whose pieces are small here, against those of the factors in memory: the same bits."""
    monkeypatch.setattr(factor_store, "PIECE_BYTES", 300)
    monkeypatch.setattr(factor_store, "CACHE_BYTES", 500)
    torch.manual_seed(0)
    model = llama(tied).eval()
    setup = setup_of(model, tmp_path)
    Factored(setup)
    shapes = {name: p.shape for name, p in trainable_parameters(model).items()}
    shards = sorted((tmp_path / "work" / "factors").glob("*.bin"))
    assert len(shards) == 3
    rows = gradient_rows(model, setup.batch, score_coefficients(setup.batch))
    side = Factored(setup)._side
    assert isinstance(side, FactorStore) and sorted(side.order.tolist()) == list(range(7))
    for name, shape in shapes.items():
        outer, inner = (shape[0], 1) if len(shape) == 1 else shape
        for some in (slice(0, outer), slice(3, outer - 2), slice(outer - 1, outer)):
            out = torch.full((7, some.stop - some.start, inner), 5.0)
            assert side.form(0, name, some, out)
            expected = rows[name][side.order].view(7, outer, inner)[:, some]
            assert_close(out, expected, 1e-5, f"{name}, {some}")
        for sequence in (0, 6):
            found = side.row(name, sequence)
            assert found is not None
            assert_close(found.view(shape), rows[name][sequence], 1e-5, f"row of {name}")
    if not tied:
        name = "model.embed_tokens.weight"
        some = torch.tensor([2, 5, 30])
        out = torch.empty(7, 3, 16)
        side.form(0, name, some, out)
        assert_close(out, rows[name][side.order][:, some], 1e-5, "some tokens")


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_whose_factors_go_to_disk_give_the_same_products(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several kinds of rows, one of them of entropies, with steps beside them; and nothing of the chunks stays."""
    monkeypatch.setattr(factor_store, "PIECE_BYTES", 300)
    torch.manual_seed(0)
    model = llama(tied).eval()
    evaluation, parameters = sequences(6, 1), trainable_parameters(model)
    score = score_coefficients(evaluation)
    kinds = {"score": score, "fixed_prefix": TokenCoefficients(score.logprob, 0.3 * score.logprob)}
    steps = {name: torch.randn(2, *p.shape) for name, p in parameters.items()}
    p = {name: torch.rand(parameter.shape) for name, parameter in parameters.items()}
    found = []
    for at_once in (0, 1, 4):
        setup = setup_of(model, tmp_path / str(at_once))
        setup = replace(setup, plan=replace(setup.plan, chunk=5, at_once=at_once))
        kernel = Kernel(KernelEngine(setup).prepare(), p)
        found.append(kernel.contract("evaluation", evaluation, kinds, ("score", "fixed_prefix"), steps))
        assert not list((tmp_path / str(at_once)).rglob("streamed-*"))
    for other in found[1:]:
        for kind in kinds:
            assert_close(other.kernel[kind], found[0].kernel[kind], 1e-6, f"kernel of {kind}")
            assert_close(other.steps[kind], found[0].steps[kind], 1e-6, f"steps of {kind}")
    assert not torch.allclose(found[0].kernel["fixed_prefix"], found[0].kernel["score"], rtol=0.1)


def test_what_a_killed_run_left_of_a_chunk_is_not_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(True).eval()
    before = product(model, tmp_path / "whole")
    setup = setup_of(model, tmp_path / "killed")
    setup = replace(setup, plan=replace(setup.plan, at_once=1))
    left = tmp_path / "killed" / "work" / "streamed-0"
    left.mkdir(parents=True)
    (left / "00000.json").write_text('{"passes": [], "arrays": []}')
    evaluation = sequences(6, 1)
    kernel = Kernel(KernelEngine(setup).prepare(), None)
    found = kernel.contract("evaluation", evaluation, {"score": score_coefficients(evaluation)}, ("score",))
    assert found is not None
    assert_close(found.kernel["score"], before, 1e-6, "kernel")


def test_layers_that_read_the_same_share_it_on_disk(tmp_path: Path) -> None:
    """q, k and v have one input, gate and up another: what is on disk is what the plan counts."""
    torch.manual_seed(0)
    model = llama(True).eval()
    setup = setup_of(model, tmp_path, shard=7)
    Factored(setup)
    same = torch.full((7,), 8)
    batch = setup.batch
    sizes = factor_sizes(model, list(trainable_parameters(model)), Lengths.of(batch, 64))
    assert sizes.inputs == 2 * (16 + 16 + 16 + 24) and sizes.head_inputs == 16 and sizes.head_cotangents == 40
    assert sizes.cotangents == 16 + 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16), "the embedding's, and each layer's outputs"
    assert sizes.plain == 5 * 16
    stored = (tmp_path / "work" / "factors" / "00000.bin").stat().st_size
    padded = 7 * sizes.most_bytes()
    assert 0.6 * padded < stored < 1.05 * padded + 8 * int(same.sum()), (stored, padded)


def test_only_missing_shards_are_written_and_damage_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(True).eval()
    before = product(model, tmp_path)
    folder = tmp_path / "work" / "factors"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "00001.json").unlink()  # as a kill between data and record leaves it
    (folder / ".00001.bin.0123456789abcdef.part").write_bytes(b"half")
    blocks = list((tmp_path / "work" / "evaluation").glob("*.npz"))
    blocks[0].unlink()
    assert torch.equal(product(model, tmp_path), before), "the same bits"
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != times.get(path.name)}
    assert changed == {"00001.bin", "00001.json"}
    for block in blocks:
        block.unlink(missing_ok=True)
    content = bytearray((folder / "00002.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "00002.bin").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"00002.bin is damaged .*delete .*00002.json and run again with --resume"):
        product(model, tmp_path)
    (folder / "00002.bin").write_bytes(bytes(content[:50]))
    with pytest.raises(UserError, match="ends at byte"):
        product(model, tmp_path)
    (folder / "00002.json").write_text('{"passes": []}')
    with pytest.raises(UserError, match=r"00002.json is damaged .*remove .*factors"):
        product(model, tmp_path)
    (folder / "00002.json").write_text('{"passes": [], "arrays": []}')
    with pytest.raises(UserError, match="factors of other sequences"):
        product(model, tmp_path)


def analysis(model: nn.Module, folder: Path | None, **options: Any) -> FisherComputation:
    """With P of two real steps."""
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    for seed in (3, 4):
        ids = sequences(8, seed).input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.tensor([1.0, -0.5, 0.7, -1.2, 0.4, 0.2, -0.6], dtype=torch.float64) / 7
    work = {} if folder is None else {"workspace": UnfinishedWork(folder)}
    kernel = KernelOptions(**work, **options)
    settings = AnalysisSettings(kernel=kernel, max_grad_norm=0.1, measure=False)
    return analyze_batches(model, optimizer, sequences(6, 1), sequences(7, 2), weights, settings)


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda: llama(True), lambda: llama(False), lora], ids=["tied", "untied", "lora"])
def test_a_whole_analysis_comes_to_the_same_numbers(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored_rows, "BLOCK_BYTES", 4 * 16 * 13 * 5)
    found = []
    for strategy in ("memory", "factored"):
        torch.manual_seed(0)
        found.append(analysis(make().eval(), tmp_path / strategy, strategy=strategy))
    expected, factored = (one.numbers for one in found)
    assert isinstance(found[1].training.kernel.rows, Factored)
    for name in ("fisher", "entropy_fisher", "train_fisher", "train_entropy_fisher"):
        assert_close(getattr(factored.kernels, name), getattr(expected.kernels, name), 2e-6, name)
    assert factored.step is not None and expected.step is not None
    assert_close(factored.step.attribution.shares, expected.step.attribution.shares, 1e-5, "shares")
    ours, theirs = factored.step.predictions.per_token, expected.step.predictions.per_token
    for estimator, parts in theirs.items():
        for part, estimate in parts.items():
            assert ours[estimator][part].value == pytest.approx(estimate.value, rel=1e-4, abs=1e-9)
    checks = {check.name: check for check in factored.checks}
    assert {check.name for check in expected.checks} == set(checks) and all(check.passed for check in factored.checks)


# ---- the plan


def size_of(n_eval: int, n_train: int) -> KernelSize:
    """SmolLM2-135M, trained whole, and sequences of 58 tokens."""
    factors = FactorSizes(97_920, 156_096, 576, 49_152, 35_136, Lengths(58, 16, 66, 16, 1100))
    return KernelSize(n_eval, n_train, 134_515_008, 4, "float32", 28_311_552, factors)


def test_factors_are_chosen_where_rows_do_not_fit() -> None:
    size = size_of(64, 64)
    assert size.factors is not None and 8 < size.row_bytes / size.factors.row_bytes() < 9
    assert plan_kernel(size, 100 * GIB).strategy == "memory", "rows where they fit: they are formed once"
    disk = plan_kernel(size, 7 * GIB, 5 * GIB)
    assert disk.at_once == 0, "no disk for the evaluation side"
    assert (disk.strategy, disk.passes) == ("factored", 128) and 0 < disk.disk < 5 * GIB
    held = disk.memory + fixed_bytes(size, "factored") - 2 * size.row_bytes
    assert held <= 7 * GIB < held + size.factors.most_bytes(4), "as many evaluation rows at a time as fit"
    memory = plan_kernel(size, 20 * GIB, 10 * GIB)
    assert (memory.strategy, memory.disk, memory.chunk) == ("factored", 0, 32)
    with pytest.raises(UserError, match=r"allow their factors on disk .*disk_budget, 3.9 GiB"):
        plan_kernel(size, 5 * GIB)
    larger = plan_kernel(size, 7 * GIB, 20 * GIB)
    assert (larger.at_once, larger.chunk) == (disk.chunk, 64) and disk.memory == larger.memory
    most = size.factors.most_bytes(4)
    assert disk.disk + 64 * most < larger.disk <= disk.disk + 1.05 * 64 * most <= 20 * GIB
    assert larger.reading == larger.disk, "all of it once"
    assert larger.read_by(128) == pytest.approx(2 * disk.disk + 2 * larger.streamed)
    assert disk.reading == -(-64 // disk.chunk) * disk.disk
    assert plan_kernel(size, 7 * GIB, 20 * GIB, processes=2).at_once == 0, "half of 64 is not twice 18"
    assert "evaluation rows (whose factors go to disk too)" in describe_plan(larger, 64)
    line = describe_plan(disk, 64)
    assert line.startswith(
        "kernel: factors of 64 training rows on disk (3.90 GiB), rows formed of them module by module"
    )
    small = KernelSize(100, 100, 5_000_000, factors=size.factors)
    assert plan_kernel(small, GIB, 100 * GIB).strategy == "disk", "rows of an adapter are smaller than their factors"


def test_factors_that_were_asked_for_and_cannot_be_had_say_why() -> None:
    size = size_of(64, 64)
    with pytest.raises(UserError, match="factors of 64 training rows take 3.71 GiB, .* raise .*disk_budget"):
        plan_kernel(size, 5 * GIB, strategy="factored")
    with pytest.raises(UserError, match="formed by hooks"):
        plan_kernel(KernelSize(4, 4, 100), GIB, strategy="factored")
    with pytest.raises(UserError, match="strategy=factored keeps no rows"):
        plan_kernel(size, 100 * GIB, 100 * GIB, save_gradients=True, strategy="factored")


class Silent(LlamaForCausalLM):
    """A head used other than by being called: hooks cannot see it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        assert found.logits is not None
        found.logits = found.logits + 0.1 * (found.logits @ self.lm_head.weight) @ self.lm_head.weight.T
        return found


def test_a_model_whose_rows_have_no_factors_gets_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(size: KernelSize, *budgets: int, **more: Any) -> KernelPlan:
        return plan_kernel(size, *budgets, **{**more, "strategy": "memory" if size.factors is None else "factored"})

    torch.manual_seed(0)
    shape: dict[str, Any] = {**SHAPE, "num_hidden_layers": 1}
    model = Silent(LlamaConfig(vocab_size=40, num_key_value_heads=1, **shape)).eval()
    with monkeypatch.context() as patched:
        patched.setattr(kernel_options, "plan_kernel", chosen)
        found = analysis(model, tmp_path / "auto")
    rows = found.training.kernel.rows
    assert rows.setup.passes.formation.looping and rows.setup.plan.strategy == "memory"
    assert UnfinishedWork(tmp_path / "auto").kept("plan") == rows.setup.plan.to_json(), (
        "a resumed analysis takes the same"
    )
    assert all(check.passed for check in found.numbers.checks)
    with pytest.raises(UserError, match="factored needs rows formed by hooks"):
        analysis(model, tmp_path / "asked", strategy="factored")
