"""One implementation on one case, in a process of its own that is told when to run.

The process is forked from a server that has imported the libraries and computed nothing, so what one implementation
patches no other sees, and memory is its own. The case is built there, the implementation wrapped around it and run once on
two rows and two columns; none of that is timed. Then each "run" is answered by one measurement.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing as mp
import os
import resource
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from kernel_peers import implementation

from kernel_parts.cases import Case, build_case, relative_error
from kernel_parts.reference import reference

MiB = 2**20
WORST_ERROR = 1e-4
PRELOAD = ["torch", "transformers", "peft", "kernel_parts.measure", "entropy_core.kernel"]


def context() -> Any:
    """Where processes come from."""
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


class Worker:
    """A process that holds one implementation; `run()` gives a measurement, or {"failed": why}."""

    def __init__(self, server: Any, task: dict[str, Any]) -> None:
        self._pipe, theirs = server.Pipe()
        self._process = server.Process(target=_serve, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()

    def run(self) -> dict[str, Any]:
        try:
            self._pipe.send("run")
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            return {
                "failed": f"the process ended with status {self._process.exitcode} (-9: out of memory, most likely)"
            }

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def compute_reference(server: Any, task: dict[str, Any]) -> None:
    """Write the case's float64 reference to task["reference"], in a process of its own."""
    process = server.Process(target=_write_reference, args=(task,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the reference of {task['case']} could not be computed (see above)")


def _write_reference(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    try:
        case = _case(task, "eager")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    path = Path(task["reference"])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(reference(case, task["case"]), path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _case(task: dict[str, Any], attention: str) -> Case:
    run = None if task["run"] is None else Path(task["run"])
    return build_case(task["case"], task["n_rows"], task["n_columns"], task["device"], run, attention)


def _serve(pipe: Any, task: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(task["threads"])
    _silence()
    try:
        while pipe.recv() == "run":
            if "measured" not in task:
                task["measured"] = _prepare(task)
            pipe.send(_measure(*task["measured"], task))
    except EOFError:
        return
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send({"failed": f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"[:400]})


def _silence() -> None:
    """Progress bars and notes of libraries would drown the driver's lines."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def _prepare(task: dict[str, Any]) -> tuple[Any, Any, Case, dict[str, Any], int, str]:
    module, cut = implementation(task["implementation"])
    case = _case(task, module.ATTENTION)
    handle = module.wrap(case, cut)
    _touch(case)
    _give_back()
    base = _resident(task["device"])
    module.kernel(_ready(module, handle, case.smallest()), case.smallest())
    expected = torch.load(task["reference"], weights_only=True)
    return module, handle, case, expected, base, " ".join(f"{name} {version(name)}" for name in module.NEEDS)


def _ready(module: Any, handle: Any, case: Case) -> Any:
    """What `kernel` takes: the handle, or what is prepared of it anew every time."""
    prepare = getattr(module, "prepare", None)
    return handle if prepare is None else prepare(handle, case)


def _give_back() -> None:
    """What is free, to the system, so that memory that building the case took does not hide what the method takes."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _touch(case: Case) -> None:
    """Weights that were mapped from a file become resident, so that they count as the model's and not as the method's."""
    for tensor in (*case.model.parameters(), *case.model.buffers()):
        float(tensor.detach().double().sum())


def _measure(
    module: Any, handle: Any, case: Case, expected: dict[str, Any], base: int, needs: str, task: dict[str, Any]
) -> dict[str, Any]:
    handle = _ready(module, handle, case)
    _give_back()
    with _watching(task["device"]) as peak:
        begun = time.perf_counter(), time.process_time()
        found = module.kernel(handle, case)
        _synchronize(task["device"])
        wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    out = {
        "wall_s": wall,
        "cpu_s": cpu,
        "base_mib": base / MiB,
        "peak_mib": peak[0] / MiB,
        "added_mib": (peak[0] - base) / MiB,
        "attention": module.ATTENTION,
        "needs": needs,
    }
    if found is not None:
        fisher = found if found.dim() == 2 else found[0]
        out["relative_error"] = relative_error(fisher, expected, "kernel")
        if found.dim() == 3:
            out["relative_error_kh"] = relative_error(found[1], expected, "entropy_kernel")
        worst = max(out["relative_error"], out.get("relative_error_kh", 0.0))
        out["right"] = worst <= WORST_ERROR
    return out


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _resident(device: str) -> int:
    """Bytes: of the process on a CPU, of torch's allocations on a GPU."""
    return psutil.Process().memory_info().rss if device == "cpu" else torch.cuda.memory_allocated()


@contextmanager
def _watching(device: str) -> Any:
    """Yields a list whose one entry is, at the end, the most bytes that were resident at any time inside.

    On a CPU the system keeps that number: exact, and without a thread beside what is timed.
    """
    peak = [0]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated()
        return
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident now
    yield peak
    unit = 1 if sys.platform == "darwin" else 1024
    peak[0] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line, whole or not at all."""
    with path.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
