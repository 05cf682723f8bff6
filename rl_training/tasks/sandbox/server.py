"""One task's process: locked down, it makes the problems and forks a child for each completion that
is to be scored.

    {"warm_up": true}                                                   -> {}, with math-verify's tables built
    {"problems": {"name", "arguments", "seed", "count"}}                -> {"problems": [[question, answer or null], ...]}
    {"readable": [answers]}                                             -> {"results": [[true or false, null], ...]}
    {"templates": true}, {"render": ...}                                -> as template_renderer.py says
    {"score": [items], "seconds", "memory", "apart"}                    -> {"results": [[value or null, why or null], ...]}

An item is [number of a problem, text] for a reasoning-gym task and [answer, text] for math-verify.
apart: a fresh child for every item, so that whatever a text does ends with it; else one child for
many (scorers that do no more than compare), and a fresh one for each of those that it left
unfinished. value: what the scorer gave; None with the reason where it did not come to that.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rl_training.errors import UserError
from rl_training.tasks.sandbox import lockdown, messages
from rl_training.tasks.sandbox.evaluation_guard import guard_evaluation
from rl_training.tasks.sandbox.template_renderer import render_in_child

# What a scorer may stumble over in a text that is no answer of its kind: such a text earns 0.
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)
_RESULT_DESCRIPTOR = 3
_LONGEST_REASON = 200
_GRACE_SECONDS = 5.0
_TOO_SLOW, _FAULT = "took longer than {:g} s", "ended its process ({})"

Scorer = Callable[[Any, str], float]


@dataclass
class _Child:
    pid: int
    items: list[int]
    end: float
    data: bytearray = field(default_factory=bytearray)


class _Server:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._problems: list[tuple[Any, dict[str, Any]]] = []
        self._map_size = os.open("/proc/self/statm", os.O_RDONLY) if os.path.exists("/proc/self/statm") else None
        self._layers = lockdown.enter_server(self._mapped())

    def run(self) -> None:
        messages.send(self._descriptor, {"layers": self._layers})
        while True:
            order = messages.receive(self._descriptor)
            try:
                answer = self._answer(order)
            except UserError as error:
                answer = {"user_error": str(error)}
            except Exception as error:  # a data set raises whatever it likes: the parent tells the user
                answer = {"user_error": f"reasoning-gym failed: {_words(error)}"}
            messages.send(self._descriptor, answer)

    def _answer(self, order: dict[str, Any]) -> dict[str, Any]:
        if "problems" in order:
            return self._make_problems(**order["problems"])
        if "templates" in order:
            return {}
        if "render" in order:
            return render_in_child(order, self._layers, self._mapped())
        if "warm_up" in order:
            from rl_training.tasks.sandbox.math_scorer import warm_up

            warm_up()
            gc.freeze()
            return {}
        if "readable" in order:
            from rl_training.tasks.sandbox.math_scorer import readable

            items = [[answer, ""] for answer in order["readable"]]
            return {"results": self._in_children(lambda answer, _: float(readable(answer)), items, order)}
        scorer: Scorer = self._score_problem
        if not self._problems:
            from rl_training.tasks.sandbox.math_scorer import score

            scorer = score
        return {"results": self._in_children(scorer, order["score"], order)}

    def _make_problems(self, name: str, arguments: dict[str, Any], seed: int, count: int) -> dict[str, Any]:
        from rl_training.tasks.reasoning_gym_problems import create_dataset, draw_entries

        random.seed(seed)  # a few data sets draw from the global stream; equal settings must give equal problems
        dataset = create_dataset(name, arguments, seed, count)
        entries = draw_entries(dataset, count)
        self._problems = [(dataset, entry) for entry in entries]
        for _, entry in self._problems[:2]:  # what a scorer imports as it goes is imported once, here
            with suppress(Exception):
                dataset.score_answer(str(entry["answer"]), entry)
        gc.collect()
        gc.freeze()  # children share these pages
        pairs = [(entry["question"], entry["answer"]) for entry in entries]
        return {"problems": [[str(question), None if a is None else str(a)] for question, a in pairs]}

    def _score_problem(self, number: int, text: str) -> float:
        dataset, entry = self._problems[number]
        return float(dataset.score_answer(text, entry))

    def _mapped(self) -> int:
        if self._map_size is None:
            return 1 << 32
        return int(os.pread(self._map_size, 100, 0).split()[0]) * os.sysconf("SC_PAGE_SIZE")

    def _in_children(self, scorer: Scorer, items: list[list[Any]], order: dict[str, Any]) -> list[list[Any]]:
        seconds, memory, parallel = float(order["seconds"]), int(order["memory"]), int(order["parallel"])
        results: list[list[Any] | None] = [None] * len(items)
        waiting = [[place] for place in range(len(items))]
        if not order["apart"] and items:
            waiting = [list(range(first, len(items), parallel)) for first in range(min(parallel, len(items)))]
        running: dict[int, _Child] = {}
        poll = select.poll()
        while waiting or running:
            while waiting and len(running) < parallel:
                reader, child = self._fork(scorer, items, waiting.pop(0), seconds, memory)
                running[reader] = child
                poll.register(reader, select.POLLIN)
            for reader, _ in poll.poll(1000):
                child = running[reader]
                part = os.read(reader, 1 << 16)
                child.data += part
                if part and len(child.data) <= 1000 * len(child.items):
                    continue
                poll.unregister(reader)
                os.close(reader)
                del running[reader]
                waiting += self._finish(child, results, seconds)
            if any(time.monotonic() > child.end for child in running.values()):
                self._give_up(running)
        return [result if result is not None else [None, "gave no result"] for result in results]

    def _fork(
        self, scorer: Scorer, items: list[list[Any]], places: list[int], seconds: float, memory: int
    ) -> tuple[int, _Child]:
        taken = self._mapped()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _score_and_end(scorer, [items[place] for place in places], writer, self._layers, seconds, memory, taken)
        os.close(writer)
        return reader, _Child(pid, places, time.monotonic() + seconds + _GRACE_SECONDS)

    def _finish(self, child: _Child, results: list[list[Any] | None], seconds: float) -> list[list[int]]:
        """Take a child's results; what it left undone goes to a child of its own, the last of a
        single item has failed.
        """
        with suppress(OSError):  # where there is a filter it may not, and need not
            os.kill(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        lines = child.data.split(b"\n")[:-1][: len(child.items)]
        for place, line in zip(child.items, lines, strict=False):
            results[place] = _parse(line)
        undone = child.items[len(lines) :]
        if len(child.items) > 1:
            return [[place] for place in undone]
        if undone:
            results[undone[0]] = [None, cause_of_death(status, seconds)]
        return []

    def _give_up(self, running: dict[int, _Child]) -> None:
        for child in running.values():
            with suppress(OSError):
                os.kill(child.pid, signal.SIGKILL)
        if self._layers:
            os._exit(1)  # with us the kernel ends our children; the parent starts another server


def cause_of_death(status: int, seconds: float) -> str:
    """Why a child ended without a result, from the status that it was reaped with."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
            return _TOO_SLOW.format(seconds)
        return _FAULT.format(signal.Signals(number).name if number in iter(signal.Signals) else f"signal {number}")
    return _FAULT.format(f"exit status {os.waitstatus_to_exitcode(status)}")


def _parse(line: bytes) -> list[Any]:
    """[value, None] or [None, reason] of what a child wrote: a finite number, or a reason in ASCII;
    never code.
    """
    try:
        found = json.loads(line.decode("ascii"))
        value, reason = found
        if reason is None and type(value) is float and math.isfinite(value):
            return [value, None]
        if isinstance(reason, str):
            return [None if value is None else 0.0, reason[:_LONGEST_REASON]]
    except (ValueError, TypeError, RecursionError):
        pass
    return [None, "wrote something else than a number into its result"]


def _score_and_end(
    scorer: Scorer,
    items: list[list[Any]],
    writer: int,
    layers: list[str],
    seconds: float,
    memory: int,
    taken: int,
) -> None:
    """In the child, which this ends: one line of JSON for each item to its descriptor 3, and
    nothing else anywhere.
    """
    try:
        os.dup2(writer, _RESULT_DESCRIPTOR, inheritable=False)
        guard_evaluation()
        lockdown.enter_completion(layers, _RESULT_DESCRIPTOR, seconds, memory, taken)
        write, leave, dump = os.write, os._exit, json.dumps
        for key, text in items:
            try:
                value = scorer(key, text)
                result = [value, None] if math.isfinite(value) else [None, f"scored {value}"]
            except MALFORMED as error:
                result = [0.0, _words(error)]
            except MemoryError:
                result = [None, "needed more memory than task.reward_memory"]
            except BaseException as error:  # a text may raise whatever there is, SystemExit too
                result = [None, f"raised {_words(error)}"]
            write(_RESULT_DESCRIPTOR, dump(result).encode("ascii") + b"\n")
        leave(0)
    finally:
        os._exit(1)


def _words(error: BaseException) -> str:
    try:
        text = repr(error)
    except BaseException:  # an exception of the text's own making, whose repr it wrote too
        text = type(error).__name__
    return " ".join(text.split())[:_LONGEST_REASON]


def serve(descriptor: int) -> None:
    """Until the other side closes the socket."""
    server = _Server(descriptor)
    with suppress(messages.Closed):
        server.run()
