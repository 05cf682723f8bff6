"""Analyses of models of which all weights are trained, and of large adapters: memory, time, disk and errors, beside the targets.

    python -m benchmarks.large_models train                the two runs that are analysed, a few steps each (runs/large/)
    python -m benchmarks.large_models run CASE ...         analyses in a process of their own, stage by stage
    python -m benchmarks.large_models check CASE ...       8 x 8 entries of a kernel again: float64, plain autograd
    python -m benchmarks.large_models floor CASE ...       the least that a kernel takes: plain passes, and one product of rows
    python -m benchmarks.large_models page                 benchmarks/results/large_models/README.md, from what both left

CPU seconds are user and system time of the process: half of them are what two cores that nothing else uses take at least. Memory
is the largest resident set that the system has seen, disk the largest size of the unfinished folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.large_models_page import write_page

RESULTS = Path(__file__).parent / "results" / "large_models"
ROOT = Path("runs/large")
CONFIG = Path(__file__).parents[1] / "rl_training" / "cfg" / "testconfig.yaml"
_K = "entropy_analysis."
_FEW = (f"{_K}analysis.intervention=false", f"{_K}analysis.weighting_steps=false", f"{_K}analysis.prices=false")
_NO_SCHEMES = f"{_K}analysis.weighting_schemes=false"
"""Without the matrix each of some fifteen weightings is a gradient and a forward-mode pass; from the matrix they cost nothing."""
_GIB = 2**30
ENTRIES = 8
PIECE = 2**20  # parameters of which a product is made at a time
_HALF_BILLION = (
    "lora.enabled=false", "optimizer.learning_rate=1e-5", "model.dtype=bfloat16", "optimizer.micro_batch_size=4",
    "task.reward=benchmarks.large_models:even_length", "rollouts.prompts_per_step=4", "rollouts.completions_per_prompt=4",
    "training.steps=1", "training.save_every=1",
)  # fmt: skip
TRAINED = {
    "full": ("lora.enabled=false", "optimizer.learning_rate=5e-6", "training.steps=2", "training.save_every=2"),
    "half-billion": _HALF_BILLION,
    "lora-288": ("lora.r=288", "lora.alpha=576", "training.steps=2", "training.save_every=2"),
}


@dataclass(frozen=True)
class Case:
    """run: of TRAINED. n_eval, n_train: sequences. gib, minutes, disk: targets, GiB and minutes of two cores."""

    run: str
    n_eval: int
    n_train: int
    gib: float | None
    minutes: float | None
    disk: float | None
    matrix: bool = True
    trusted: bool = False

    def overrides(self) -> list[str]:
        """Of the configuration."""
        without = [f"{_K}fisher_kernel.compute_full=false", f"{_K}fisher_kernel.token_batch_size=512", _NO_SCHEMES]
        kernel = [] if self.matrix else without
        kernel += [f"{_K}fisher_kernel.memory_budget={self.gib:g}GiB"] if self.gib else []
        kernel += [f"{_K}fisher_kernel.disk_budget={self.disk:g}GiB"] if self.disk else []
        sizes = [f"{_K}eval_batch_size={self.n_eval}", f"{_K}train_batch_size={self.n_train}"]
        return [*sizes, *kernel, *_FEW]


CASES = {
    "full-64-without": Case("full", 64, 64, 5, 6, None, matrix=False),
    "full-64": Case("full", 64, 64, 10, 20, 10),
    "full-128": Case("full", 128, 256, 12, 40, 40),
    "lora-128": Case("lora-288", 128, 256, 8, 15, 40),
    "half-billion-16": Case("half-billion", 16, 16, 20, None, 40, trusted=True),
    "full-8": Case("full", 8, 16, 10, None, 10),
    "full-8-without": Case("full", 8, 16, 5, None, None, matrix=False),
}
"""The sizes that were asked for, and two small ones whose stages show what time follows."""


def train(names: list[str]) -> None:
    """The runs; one that is there is left alone."""
    for name in names or list(TRAINED):
        if not (ROOT / name).exists():
            common = (f"training.output_dir={ROOT / name}", "training.report_to=[]", "entropy_probe.enabled=false")
            model = [f"model.name={random_policy(ROOT / 'half-billion-policy')}"] if name == "half-billion" else []
            arguments = ["train", str(CONFIG), *common, *model, *TRAINED[name]]
            subprocess.run([sys.executable, "-m", "entropy_experiments", *arguments], check=True)


def random_policy(folder: Path) -> Path:
    """A policy of Qwen2.5-0.5B's sizes with random weights in bfloat16, over words of numbers."""
    if folder.exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, 151936)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def even_length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 for completions of an even number of characters: half of what a random policy writes."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2 == 0) for text in texts]


def run(name: str, folder: Path | None) -> None:
    """Analyse, and add a line to measurements.jsonl."""
    case, out = CASES[name], ROOT / "results" / name
    trust = ["--trust"] if case.trusted else []
    arguments = [str(folder or ROOT / case.run), f"output_dir={out}", *case.overrides(), *trust]
    begun, stages, seen, over = time.time(), list[dict[str, Any]](), [0], threading.Event()
    command = [sys.executable, "-m", "entropy_experiments", "analyze", *arguments, "--overwrite"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    threading.Thread(target=_watch_folder, args=(out, over, seen), daemon=True).start()
    for line in child.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("analysis: "):
            stages.append(
                {"line": line.removeprefix("analysis: ").strip(), "wall": time.time() - begun, **_so_far(child.pid)}
            )
    _, status, used = os.wait4(child.pid, 0)  # of this process alone, where several cases run one after another
    child.returncode = os.waitstatus_to_exitcode(status)
    over.set()
    found = next(iter(sorted(out.glob("analysis_*/*/run.json"))), None)
    record = {} if found is None else json.loads(found.read_text())
    _add(
        {
            "case": name, "status": child.returncode, "wall": time.time() - begun, "cpu": used.ru_utime + used.ru_stime,
            "peak": used.ru_maxrss * 1024, "disk": max(seen), "stages": stages, "self_checks": record.get("self_checks"),
            "environment": {key: record.get(key) for key in ("versions", "git_sha", "hardware")},
            "command": f"analyze {' '.join(arguments)}", "load": os.getloadavg()[1],
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
    )  # fmt: skip


def _so_far(process: int) -> dict[str, float]:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    return {"cpu": (int(fields[11]) + int(fields[12])) / ticks, "peak": 1024 * int(status["VmHWM"].split()[0])}


def _watch_folder(folder: Path, over: threading.Event, seen: list[int]) -> None:
    """Append the folder's size every few seconds, until it is over."""
    while not over.wait(3):
        seen.append(_size(folder))


def _size(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # one was written anew, or went, in between
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _add(line: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "measurements.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def check(name: str, folder: Path | None) -> None:
    """K1 of the first sequences in float64, and how far the kernel and plain autograd in float32 are from it."""
    import torch

    from entropy_experiments.records.reader import read_results_folder

    case = CASES[name]
    loaded = read_results_folder(_results(name))
    evaluation, training = (side[:ENTRIES] for side in _sequences(name))
    run, temperature = folder or ROOT / case.run, loaded.summary.policy.sampling_config.temperature
    exact, plain = (_by_autograd(run, dtype, temperature, evaluation, training) for dtype in ("float64", "float32"))
    ours = torch.from_numpy(loaded.kernels["fisher"][:ENTRIES, : len(training)]).double()
    error, of_float32 = (float((found - exact).norm() / exact.norm()) for found in (ours, plain))
    print(
        f"{name}: {exact.numel()} entries, relative Frobenius error {error:.1e}, of plain autograd in float32 {of_float32:.1e}"
    )
    _add({"case": name, "entries": exact.numel(), "error": error, "float32": of_float32})


def _results(name: str) -> Path:
    return next(iter(sorted((ROOT / "results" / name).glob("analysis_*/*_checkpoint-*"))))


def _sequences(name: str) -> list[list[dict[str, Any]]]:
    """Both buffers, in the order of the kernel's axes."""
    import pyarrow.parquet as pq

    columns = ["buffer", "row", "prompt_index", "prompt_ids", "completion_ids"]
    rows = pq.read_table(_results(name) / "sequences.parquet", columns=columns).to_pylist()
    return [
        sorted((s for s in rows if s["buffer"] == side), key=lambda s: s["row"]) for side in ("evaluation", "training")
    ]


def floor(name: str, folder: Path | None) -> None:
    """CPU seconds of the least that both kernels take of the training columns: a forward and a backward pass over the training
    side for its rows, a forward and two backward passes over each side for what meets them, and their four products.
    """
    import torch

    from entropy_core.batch import SequenceBatch
    from entropy_core.entropy import entropy_coefficients, score_coefficients
    from entropy_core.gradients import batch_gradients, trainable_parameters
    from entropy_core.passes.settings import PassSettings
    from entropy_core.scores import token_statistics
    from entropy_experiments.checkpoint_loader import load_checkpoint

    checkpoint = load_checkpoint(folder or ROOT / CASES[name].run, require_optimizer=False, widened=True)
    model, pad = checkpoint.model, checkpoint.tokenizer.pad_token_id
    evaluation, training = (
        SequenceBatch.from_sequences(
            [s["prompt_ids"] for s in side],
            [s["completion_ids"] for s in side],
            [s["prompt_index"] for s in side],
            pad,
            1.0,
        )
        for side in _sequences(name)
    )
    passes = PassSettings(2048)
    seconds = {}
    for what, batch, both in (("rows", training, False), ("evaluation", evaluation, True), ("own", training, True)):
        terms = [score_coefficients(batch)]
        if both:
            terms.append(entropy_coefficients(token_statistics(model, batch, passes), batch))
        begun = time.process_time()
        batch_gradients(model, batch, terms, passes)
        seconds[what] = time.process_time() - begun
    size = sum(p.numel() for p in trainable_parameters(model).values())
    columns = torch.randn(len(training), PIECE)
    for what, batch in (("evaluation_product", evaluation), ("own_product", training)):
        rows = torch.randn(len(batch), PIECE)
        found = torch.zeros(len(batch), len(training))
        begun = time.process_time()
        for _ in range(2 * -(-size // PIECE)):
            torch.addmm(found, rows, columns.T, out=found)
        seconds[what] = time.process_time() - begun
    print(f"{name}: {sum(seconds.values()):.0f} CPU seconds at least, {seconds}")
    _add({"case": name, "floor": seconds, "parameters": size})


def _by_autograd(run: Path, dtype: str, temperature: float, evaluation: list[Any], training: list[Any]) -> Any:
    """(n_eval, n_train) K1, one sequence at a time, P by its formula; products in float64."""
    import torch

    from entropy_experiments.checkpoint_loader import load_checkpoint

    checkpoint = load_checkpoint(run, dtype=dtype)
    model, moments = checkpoint.model, checkpoint.optimizer
    assert moments is not None
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.get_input_embeddings().padding_idx = (
        None  # whose row torch gives no gradient: kernels are of the true derivatives
    )

    def row(sequence: dict[str, Any]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[*sequence["prompt_ids"], *sequence["completion_ids"]]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(sequence["prompt_ids"]) - 1 : -1]
        logprobs = torch.log_softmax(logits / temperature, -1)
        score = logprobs.gather(1, torch.tensor(sequence["completion_ids"])[:, None]).sum()
        return dict(zip(parameters, torch.autograd.grad(score, list(parameters.values())), strict=True))

    columns = [{n: g.float() for n, g in row(s).items()} for s in training]
    found = torch.zeros(len(evaluation), len(columns), dtype=torch.float64)
    for t, sequence in enumerate(evaluation):
        for n, g in row(sequence).items():
            s = moments[n]
            left = g.double() / ((s.exp_avg_sq.double() / (1 - s.beta2**s.step)).sqrt() + s.eps)
            for i, column in enumerate(columns):
                found[t, i] += torch.dot(left.flatten(), column[n].double().flatten())
    return found


def main() -> None:
    """One of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("train", "run", "check", "floor", "page"))
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--run", type=Path, default=None, help="a training run in place of that under runs/large")
    options = parser.parse_args()
    if options.command == "train":
        train(options.cases)
    elif options.command == "page":
        write_page(RESULTS, CASES)
    else:
        for name in options.cases:
            {"run": run, "check": check, "floor": floor}[options.command](name, options.run)


if __name__ == "__main__":
    main()
