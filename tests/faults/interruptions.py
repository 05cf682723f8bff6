"""Commands that are killed, or whose disk fills, at counted points of their work; then gone on with, and compared bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_training.configuration import dump_config
from tests.entropy_experiments.checkpoints.readers.written_formats import SHARDED
from tests.entropy_experiments.small_analysis import OFF, SMALL
from tests.faults.cases import Case
from tests.tiny_policy import tiny_train_config
from tests.warm_python import WarmProcess

PRELUDE = "tests.faults.dying:arm"
SIZES = (2_000, 3_000, 4_000, 8_000, 16_000, 30_000, 50_000, 80_000, 120_000, 200_000)  # what it says must fit
_NOT_COMPARED = ("time", "second", "per_s")
_FULL_LINE = ("no space left", "disk is full", "file limit", "larger than this file system")
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


def commands(policy: Path, run: Path, results: Path, foreign: Path) -> dict[str, Command]:
    """policy: of tests/tiny_policy. run: of 2 checkpoints. results: an analysis of it. foreign: formats of other trainers."""

    def train(folder: Path) -> list[str]:
        small = {"prompts_per_step": 2, "completions_per_prompt": 4, "max_completion_length": 4}
        config = tiny_train_config(
            policy, folder / "run", training={"steps": 3, "save_every": 1}, rollouts=small,
            entropy_probe={"eval_sequences": 8, "on_error": "raise", "mode": "simple"},
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
        shutil.copytree(results, folder / "analysis")
        return ["compare", str(results), str(folder / "analysis"), "--output", str(folder / "compared"), "--quiet"]

    def bring(folder: Path) -> list[str]:
        source = [str(foreign / SHARDED), "--model", str(foreign / "policy")]
        return ["import", *source, "--output", str(folder / "run")]

    return {
        "import": Command("import", bring, (), _imported),
        "train": Command("train", train, ("--resume",), _trained),
        "analyze": Command("analyze", analyze, ("--resume",), _analysed),
        "sweep": Command("sweep", sweep, ("--resume",), _analysed),
        "report": Command(
            "report", report, (), lambda folder: {"page": (folder / "analysis" / "report.html").read_bytes()}
        ),
        "compare": Command(
            "compare", compare, (), lambda folder: {"page": (folder / "compared" / "comparison.parquet").read_bytes()}
        ),
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


class Interruptions:
    """Cases over the points of every command. counted: how many points an undisturbed run has, found when first asked."""

    def __init__(self, found: Mapping[str, Command], scratch: Path) -> None:
        self._commands, self._scratch, self._expected = found, scratch, {}

    def _undisturbed(self, command: Command) -> tuple[int, Mapping[str, Any]]:
        if command.name not in self._expected:
            folder = self._scratch / command.name
            folder.mkdir()
            code, said = _run(command.prepare(folder), FAULT_COUNT=str(folder / "count"))
            assert code == 0, said
            self._expected[command.name] = (int((folder / "count").read_text()), command.bits(folder))
        return self._expected[command.name]

    def cases(self, name: str, fault: str, count: int) -> Iterator[Case]:
        """`count` points, evenly over the command's work."""
        command = self._commands[name]
        points = self._undisturbed(command)[0]
        for point in sorted({1 + (points - 1) * k // max(count - 1, 1) for k in range(count)}):
            act = self._act(command, fault, FAULT=fault, FAULT_POINT=str(point))
            yield Case(f"{_WORDS[fault]} during {name}", f"at point {point} of {points}", act)

    def sizes(self, name: str) -> Iterator[Case]:
        """Files that may not grow beyond a size."""
        for size in SIZES:
            act = self._act(self._commands[name], "size", FAULT_SIZE=str(size))
            yield Case(f"file limits during {name}", f"{size:,} bytes", act)

    def _act(self, command: Command, fault: str, **environment: str) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            from rl_training.errors import UserError

            expected = self._undisturbed(command)[1]
            arguments = command.prepare(folder)
            code, said = _run(arguments, **environment)
            lines = [line for line in said.splitlines() if line.startswith("error:")]
            if fault == "kill":
                assert code == -signal.SIGKILL, (code, said)
            elif fault == "term":
                assert code in (0, 128 + signal.SIGTERM), (code, said)
            elif code:
                assert code == 2 and len(lines) == 1 and any(words in lines[0].lower() for words in _FULL_LINE), said[
                    -600:
                ]
                assert "Traceback" not in said, said
            if code:
                again, said = _run([*arguments, *command.again])
                # Where it was whole already, that is said, and the bits below tell.
                assert again == 0 or (again == 2 and "exists already" in said), said[-600:]
            found = command.bits(folder)
            different = [key for key in expected if found.get(key) != expected[key]]
            assert not different, f"after going on, {different[:3]} differ"
            raise UserError("as it must be")  # the end that a case of this table has

        return act


_WORDS = {"kill": "kills", "term": "SIGTERM", "full": "full disks", "torch": "full disks in torch's words"}


def _run(arguments: list[str], **environment: str) -> tuple[int, str]:
    own = {**os.environ, **environment}
    process = WarmProcess("-m", "entropy_experiments", *arguments, env=own, prelude=PRELUDE)
    try:
        _, errors = process.communicate(timeout=1400)
    except BaseException:
        process.kill()
        raise
    return process.wait(), errors
