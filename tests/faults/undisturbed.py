"""Commands that the harness interrupts, what each leaves when nothing happens to it, and how they are started and waited for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_training.configuration import dump_config
from tests import warm_python
from tests.entropy_experiments.checkpoints.readers.written_formats import SHARDED
from tests.entropy_experiments.small_analysis import OFF, SMALL
from tests.tiny_policy import tiny_train_config
from tests.warm_python import WarmProcess

PRELUDE = "tests.faults.dying:arm"
BEGINS_ANEW = "was interrupted before its first checkpoint; it begins anew"
_LONG = 1400.0
_NOT_COMPARED = ("time", "second", "per_s")
_QUICK = [f"entropy_analysis.analysis.{name}=false" for name in OFF] + [
    "entropy_analysis.analysis.fresh_scales=[]", "entropy_analysis.analysis.step_scales=[0.25, 1.0]", *SMALL,
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """prepare: fills an empty folder and returns the arguments. again: added to go on. bits: what must be equal in the end."""

    name: str
    prepare: Callable[[Path], list[str]]
    again: tuple[str, ...]
    bits: Callable[[Path], Mapping[str, Any]]


def sums(path: Path) -> dict[str, Any]:
    """A task of sums, written to `path`: no process has to import what a reasoning-gym task is made of."""
    rows = ({"prompt": f"{k}+{k % 7}=", "answer": str(k + k % 7)} for k in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "jsonl", "path": str(path), "arguments": {}}


def commands(policy: Path, run: Path, results: Path, foreign: Path) -> dict[str, Command]:
    """policy: of tests/tiny_policy. run: of 2 checkpoints. results: an analysis of it. foreign: formats of other trainers."""
    task = sums(policy.with_name("sums.jsonl"))

    def train(folder: Path) -> list[str]:
        small = {"prompts_per_step": 6, "completions_per_prompt": 2, "max_completion_length": 4}
        config = tiny_train_config(
            policy, folder / "run", training={"steps": 3, "save_every": 1}, rollouts=small, task=task,
            optimizer={"micro_batch_size": 2},
            entropy_probe={"eval_sequences": 6, "on_error": "raise", "mode": "simple"},
        )  # fmt: skip
        (folder / "train.yaml").write_text(dump_config(config))
        return ["train", str(folder / "train.yaml"), "--quiet"]

    def analyze(folder: Path) -> list[str]:
        return ["analyze", str(run), "--trust", "--quiet", *_QUICK, f"output_dir={folder / 'results'}"]

    def sweep(folder: Path) -> list[str]:
        return ["sweep", str(run), "--trust", "--quiet", "--folder", str(folder / "sweep"), *_QUICK]

    def report(folder: Path) -> list[str]:
        shutil.copytree(results, folder / "analysis")
        return ["report", str(folder / "analysis")]

    def compare(folder: Path) -> list[str]:
        again = shutil.copytree(results, folder / "again" / results.name)  # pages name a folder and what it lies in
        return ["compare", str(results), str(again), "--output", str(folder / "compared"), "--quiet"]

    def bring(folder: Path) -> list[str]:
        source = [str(foreign / SHARDED), "--model", str(foreign / "policy")]
        return ["import", *source, "--output", str(folder / "run")]

    def page(*path: str) -> Callable[[Path], Mapping[str, Any]]:
        return lambda folder: {"page": folder.joinpath(*path).read_bytes()}

    return {
        "import": Command("import", bring, (), _imported),
        "train": Command("train", train, ("--resume",), _trained),
        "analyze": Command("analyze", analyze, ("--resume",), _analysed),
        "sweep": Command("sweep", sweep, ("--resume",), _analysed),
        "report": Command("report", report, (), page("analysis", "report.html")),
        "compare": Command("compare", compare, (), page("compared", "comparison.parquet")),
    }


def _trained(folder: Path) -> Mapping[str, Any]:
    import torch
    from safetensors.torch import load_file

    checkpoint = folder / "run" / "checkpoint-3"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{k}.{name}": v.numpy().tobytes() for k, entry in state.items() for name, v in entry.items()}
    weights = {k: v.numpy().tobytes() for k, v in load_file(checkpoint / "adapter_model.safetensors").items()}
    rollouts = {p.name: p.read_bytes() for p in sorted((folder / "run" / "rollouts").glob("*.parquet"))}
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {key: value for key, value in row.items() if not any(word in key for word in _NOT_COMPARED)} for row in rows
    ]
    left = [path.name for path in folder.rglob("*.part")]
    return {**moments, **weights, **rollouts, "log": logged, "left": left}


def _imported(folder: Path) -> Mapping[str, Any]:
    place = folder / "run"
    files = [
        path for path in sorted(place.rglob("*")) if path.is_file() and path.suffix in (".safetensors", ".pt", ".json")
    ]
    # The record says when it was made.
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in files if "import" not in path.name} | {
        "left": [path.name for path in place.rglob("*.part")]
    }


def _analysed(folder: Path) -> Mapping[str, Any]:
    found: dict[str, Any] = {"left": [path.name for path in folder.rglob("*.part")]}
    for path in sorted(folder.rglob("kernel.safetensors")):
        place = path.parent.name
        found |= {
            f"{place}/{name}": (path.parent / name).read_bytes()
            for name in ("kernel.safetensors", "summary.json", "sequences.parquet")
        }
    return found


@dataclass(frozen=True)
class Whole:
    """What an undisturbed command did: points counted by tests.faults.dying, processor seconds of one of its processes, bytes
    that it wrote in pages of 4 KiB, and the bits that it left.
    """

    points: int
    seconds: float
    size: int
    bits: Mapping[str, Any]


class Undisturbed:
    """Every command in 1, 2, 3 processes, run once when first asked for; kept in `folder` for a harness that goes on."""

    def __init__(self, found: Mapping[str, Command], folder: Path) -> None:
        self.commands, self._folder = found, folder
        self._known: dict[tuple[str, int], Whole] = {}

    def of(self, name: str, count: int = 1) -> Whole:
        if (name, count) not in self._known:
            kept = self._folder / f"{name}-{count}.pickle"
            if not kept.exists():
                kept.write_bytes(pickle.dumps(self._run(name, count, self._folder / f"{name}-{count}")))
            self._known[name, count] = pickle.loads(kept.read_bytes())
        return self._known[name, count]

    def _run(self, name: str, count: int, folder: Path) -> Whole:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = self.commands[name]
        arguments, before, before_seconds = command.prepare(folder), _files(folder), warm_python.cpu_seconds[0]
        counted = self._folder / f"{name}-{count}.points"
        ended = wait_for(start(arguments, count, FAULT_COUNT=str(counted)))
        assert all(code == 0 for code, _ in ended), ended
        seconds = (warm_python.cpu_seconds[0] - before_seconds) / count
        points = int(counted.read_text()) if count == 1 else 0  # several end by os._exit, and count nothing
        return Whole(points, seconds, _bytes(_files(folder) - before), command.bits(folder))


_File = tuple[Path, int, int]


def _files(folder: Path) -> set[_File]:
    """Path, inode and size: one that was written anew, under the same name, is another."""
    return {(p, p.stat().st_ino, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def _bytes(files: set[_File]) -> int:
    """What they take of a file system with pages of 4 KiB."""
    return sum(-(-size // 4096) * 4096 for _, _, size in files)


def start(arguments: list[str], count: int = 1, **environment: str) -> list[WarmProcess]:
    """`count` processes of a command, as a launcher starts them."""
    group: dict[str, str] = {}
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        WarmProcess(
            "-m", "entropy_experiments", *arguments, prelude=PRELUDE,
            env={**os.environ, **environment, **group, **({"RANK": str(r), "LOCAL_RANK": str(r)} if group else {})},
        )
        for r in range(count)
    ]  # fmt: skip


def wait_for(processes: list[WarmProcess]) -> list[tuple[int, str]]:
    """(exit code, what was said on stderr) of each."""
    try:
        return [(process.wait(_LONG), process.communicate(_LONG)[1]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def go_on(command: Command, arguments: list[str], count: int, folder: Path, whole: Whole) -> None:
    """The command once more, as its line says; the bits of an undisturbed one must come of it.

    A training that had begun and had no checkpoint yet must say that it begins anew.
    """
    run = folder / "run"
    begun = command.name == "train" and (run / "config.yaml").exists()  # which appears with the first step
    anew = begun and not any(path.name.removeprefix("checkpoint-").isdigit() for path in run.iterdir())
    ended = wait_for(start([*arguments, *command.again], count))
    # Where it was whole already, that is said, and the bits tell.
    done = all(code == 0 or (code == 2 and "exists already" in said) for code, said in ended)
    assert done, [(code, said[-500:]) for code, said in ended]
    assert not anew or BEGINS_ANEW in ended[0][1], f"nothing is said of beginning anew: {ended[0][1][-300:]}"
    found = command.bits(folder)
    different = [key for key in whole.bits if found.get(key) != whole.bits[key]]
    assert not different, f"after going on, {different[:3]} differ"


def refused_in_one_line(said: str, words: tuple[str, ...] = ()) -> None:
    """One line of error, no traceback, none of ours; with one of `words`, where there are any."""
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in said and "our mistake" not in said, said[-600:]
    assert not words or any(word in lines[0].lower() for word in words), lines[0]
