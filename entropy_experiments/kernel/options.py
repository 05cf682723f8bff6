"""What a kernel may cost and where its pieces go: from a configuration to an engine with a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from entropy_core.batch import SequenceBatch, length_buckets
from entropy_core.cut_weights import open_cut
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.row_formation import Method, RowFormation
from entropy_core.passes.settings import PassSettings
from entropy_core.processes import ALONE, Processes
from entropy_core.sketch import ModuleSketch
from entropy_experiments.config import FisherKernelConfig
from entropy_experiments.kernel.contraction import ROW_KINDS
from entropy_experiments.kernel.engine import KernelEngine
from entropy_experiments.kernel.factor_sizes import Lengths, factor_sizes
from entropy_experiments.kernel.modules import chosen_parameters
from entropy_experiments.kernel.plan import (
    KernelPlan,
    KernelSize,
    Strategy,
    plan_directions,
    plan_kernel,
    plan_sketch,
)
from entropy_experiments.kernel.row_passes import RowPasses
from entropy_experiments.kernel.strategy import KernelSetup
from entropy_experiments.kernel.unfinished_work import UnfinishedWork
from entropy_experiments.run.reporter import SILENT, Reporter
from rl_training.errors import UserError

_DEFAULT_SHARE = 0.8  # of the free memory, where no budget is given
_GIBIBYTE = 2**30
LOGIT_BYTES = 2**27  # logits of a few hundred tokens at a time, and what is made of them


@dataclass(frozen=True)
class KernelOptions:
    """memory_budget: bytes the process may take in all, None: most of what is free. disk_budget: bytes of a gradient store.
    modules: shell patterns of parameter names, None: all trainable. projection_dim: numbers that a module's rows are projected
    to, None: rows as they are. strategy: None lets the plan choose. method: how rows are formed.
    """

    strategy: Strategy | None = None
    method: Method = "auto"
    memory_budget: int | None = None
    disk_budget: int = 0
    save_gradients: bool = False
    storage: str = "float32"
    modules: Sequence[str] | None = None
    projection_dim: int | None = None
    workspace: UnfinishedWork | None = None
    store_folder: Path | None = None
    processes: Processes = ALONE
    reporter: Reporter = SILENT

    def plan(
        self,
        model: nn.Module,
        n_eval: int,
        n_train: int,
        passes: PassSettings,
        matrix: bool = True,
        kinds: int = len(ROW_KINDS),
        lengths: Lengths | None = None,
    ) -> KernelPlan:
        """The same in every process.

        Args:
            matrix: whether kernels are wanted.
            kinds: kinds of rows that the evaluation side has.
            lengths: of the sequences; None: passes are as large as may be, and no factors of rows are kept.

        Raises:
            UserError: where nothing fits.
        """
        size = self.size(model, n_eval, n_train, kinds, lengths if matrix else None)
        tokens = passes.token_batch_size if lengths is None else lengths.a_pass
        one_pass = pass_bytes(model, tokens)
        left = self._room(model, one_pass)

        def make() -> KernelPlan:
            kept = None if self.workspace is None else self.workspace.kept("plan")
            if kept is not None:  # finished blocks were cut by it
                return KernelPlan(**kept)
            sketch = self._sketch(model)
            if not matrix and not self.save_gradients:
                plan = plan_directions(size, left, one_pass)
            elif sketch is not None:
                plan = plan_sketch(size, left, sketch.size)
            else:
                budgets = (left, self.disk_budget)
                plan = plan_kernel(
                    size,
                    *budgets,
                    save_gradients=self.save_gradients,
                    strategy=self.strategy,
                    processes=self.processes.size,
                )
            if self.workspace is not None:
                self.workspace.keep("plan", plan.to_json())
            return plan

        cut = open_cut()
        return (self.processes if cut is None else cut.processes).from_root(make)

    def _room(self, model: nn.Module, one_pass: int) -> int:
        """Bytes that rows may take in all, beside a pass. They are held where their parameters are, in proportion: of several
        devices the one with the least room for its share decides.
        """
        if self.memory_budget:
            return self.memory_budget - held_memory(model) - one_pass
        names = set(chosen_parameters(model, self.modules))
        counts: Counter[torch.device] = Counter()
        for name, p in model.named_parameters():
            counts[p.device] += p.numel() if name in names else 0
        total = sum(counts.values())
        # a whole pass counted on each: too much rather than too little
        rooms = {d: _DEFAULT_SHARE * free_memory(d) - one_pass for d, count in counts.items() if count}
        return int(min(room * total / counts[d] for d, room in rooms.items()))

    def _sketch(self, model: nn.Module) -> ModuleSketch | None:
        if self.projection_dim is None:
            return None
        if self.save_gradients or self.strategy is not None:
            raise UserError(
                "fisher_kernel.projection_dim keeps sketches of the rows: leave out save_gradients, and strategy at auto"
            )
        names = set(chosen_parameters(model, self.modules))
        return ModuleSketch({n: p.shape for n, p in model.named_parameters() if n in names}, self.projection_dim)

    def size(
        self,
        model: nn.Module,
        n_eval: int,
        n_train: int,
        kinds: int = len(ROW_KINDS),
        lengths: Lengths | None = None,
    ) -> KernelSize:
        names = set(chosen_parameters(model, self.modules))
        counts = [p.numel() for name, p in trainable_parameters(model).items() if name in names]
        # whether they are wanted at all decides the plan; a model that takes no two tokens alone has none
        known = (
            lengths is not None and self.method != "loop" and not self.save_gradients and self.projection_dim is None
        ) and open_cut(model) is None  # stretches are kept as rows
        sizes = factor_sizes(model, names, lengths) if known and lengths is not None else None
        return KernelSize(n_eval, n_train, sum(counts), kinds, self.storage, max(counts), sizes)

    def engine(
        self,
        model: nn.Module,
        batch: SequenceBatch,
        n_eval: int,
        passes: PassSettings,
        matrix: bool = True,
        kinds: int = len(ROW_KINDS),
    ) -> KernelEngine:
        """Planned for `batch` as columns. Raises UserError where nothing fits, or a pattern matches no parameter."""
        names, arguments = chosen_parameters(model, self.modules), (model, n_eval, len(batch), passes, matrix, kinds)
        plan = self.plan(*arguments, Lengths.of(batch, passes.token_batch_size))
        self.reporter.note(describe_plan(plan, len(batch)))

        def without_factors() -> KernelPlan:
            if self.workspace is not None:
                self.processes.from_root(self.workspace.forget_plan)
            found = self.plan(*arguments)
            self.reporter.note(describe_plan(found, len(batch)))
            return found

        return KernelEngine(
            KernelSetup(
                RowPasses(model, tuple(names), replace(passes, method=self.formation(batch, plan, passes))),
                batch,
                plan,
                self.processes,
                self.workspace,
                self.store_folder,
                self.storage,
                self._sketch(model),
                self.reporter,
                without_factors,
            )
        )

    def formation(self, batch: SequenceBatch, plan: KernelPlan, passes: PassSettings) -> RowFormation:
        """How rows are formed; the cost of a loop is stated in passes of the whole kernel, `batch` being one side."""

        def cost() -> tuple[int, int]:
            buckets = len(length_buckets(batch, passes.token_batch_size, fewest=False))
            return plan.passes, max(2, round(plan.passes * buckets / len(batch)))

        root = self.processes.is_root
        return RowFormation(self.method, announce=(self.reporter if root else SILENT).note, cost=cost)


def kernel_options(
    settings: FisherKernelConfig,
    work: UnfinishedWork | None = None,
    processes: Processes | None = None,
    reporter: Reporter = SILENT,
) -> KernelOptions:
    """What the configuration says; gradients are stored beside the work folder."""
    return KernelOptions(
        strategy=None if settings.strategy == "auto" else settings.strategy,
        method=settings.method,
        memory_budget=settings.memory_budget,
        disk_budget=settings.disk_budget,
        save_gradients=settings.save_gradients,
        storage=settings.gradient_dtype,
        modules=settings.filter_modules,
        projection_dim=settings.projection_dim,
        workspace=work,
        store_folder=None if work is None else work.folder.parent / "gradients",
        processes=processes or Processes(),
        reporter=reporter,
    )


def describe_plan(plan: KernelPlan, n_train: int) -> str:
    """One line."""
    if plan.strategy == "directions":
        return "no kernel: derivatives along the step and its parts, and no gradient rows"
    size = f"{plan.memory / _GIBIBYTE:.2f} GiB of gradients in memory"
    if plan.strategy == "memory":
        stored = f", stored as well ({plan.disk / _GIBIBYTE:.2f} GiB)" if plan.disk else ""
        return f"kernel: all {n_train} training rows, {size}{stored}"
    if plan.strategy == "sketch":
        return f"kernel: {n_train} training rows as random projections, {plan.memory / _GIBIBYTE:.2f} GiB in memory"
    if plan.strategy == "disk":
        return (
            f"kernel: {n_train} training rows on disk ({plan.disk / _GIBIBYTE:.2f} GiB), read once for every {plan.chunk} "
            f"evaluation rows; {size}"
        )
    if plan.strategy == "factored":
        where = f"on disk ({plan.disk / _GIBIBYTE:.2f} GiB)" if plan.disk else "in memory"
        return (
            f"kernel: factors of {n_train} training rows {where}, rows formed of them module by module for every {plan.chunk} "
            f"evaluation rows{' (whose factors go to disk too)' if plan.at_once else ''}; {plan.memory / _GIBIBYTE:.2f} GiB of "
            "factors in memory"
        )
    tiles = -(-n_train // plan.tile)
    return f"kernel: {tiles} tiles of {plan.tile} training rows, {plan.passes} passes; {size}"


def pass_bytes(model: nn.Module, tokens: int) -> int:
    """About what one forward pass over so many tokens with its graph holds, from the model's shapes: on the high side."""
    config = getattr(model, "config", None)
    width, layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not isinstance(width, int) or not isinstance(layers, int):
        return _GIBIBYTE
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * width
    vocabulary = getattr(config, "vocab_size", 0)
    number = max([4, *(p.dtype.itemsize for p in model.parameters())])
    return number * (tokens * layers * (14 * width + 4 * inner) + 2 * vocabulary) + LOGIT_BYTES


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # what can be had without swapping: memory that only caches files counts, which "free" pages would leave out
    return psutil.virtual_memory().available


def held_memory(model: nn.Module) -> int:
    """Bytes this process holds on all devices that parameters lie on."""
    devices = {p.device for p in model.parameters()}
    return sum(used_memory(device) for device in devices if device.type != "meta")


def used_memory(device: torch.device) -> int:
    """Bytes this process holds on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss
