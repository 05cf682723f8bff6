"""Hostile completions: whatever a text does, its process ends with it, and nothing outside is touched."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl_training.config import TaskConfig
from rl_training.errors import UserError
from rl_training.sampling import Rollouts, score
from rl_training.sequences import RolloutSequence
from rl_training.tasks.sandbox import client, seccomp
from rl_training.tasks.sandbox.evaluation_guard import refuse_more_than_mathematics
from rl_training.tasks.sandbox.scoring import RewardLimits, SandboxedScorer, mathematics_server
from rl_training.tasks.task import Task, load_task, rewards

ROOT = Path(__file__).resolve().parents[3]
sealed_here = pytest.mark.skipif(not seccomp.supported(), reason="no system call filter is known for this machine")

_TOO_SLOW, _OTHER = "took longer", "ended its process|raised"
# What the text does, and how its result must look: a number where it is only stopped from doing harm, else the reason.
HOSTILE = {
    "makes a file": ("open('{folder}/made', 'w')", "PermissionError"),
    "makes a file by number": ("import os; os.open('{folder}/made', os.O_CREAT | os.O_WRONLY)", "PermissionError"),
    "makes a file in memory": ("import os; os.memfd_create('x')", "PermissionError"),
    "appends to a file": ("open('{folder}/victim', 'a').write('x')", "PermissionError"),
    "deletes a file": ("import os; os.remove('{folder}/victim')", "PermissionError"),
    "renames a file": ("import os; os.rename('{folder}/victim', '{folder}/gone')", "PermissionError"),
    "changes rights": ("import os; os.chmod('{folder}/victim', 0o777)", "PermissionError"),
    "makes a folder": ("import os; os.mkdir('{folder}/made')", "PermissionError"),
    "makes a link": ("import os; os.symlink('{folder}/victim', '{folder}/made')", "PermissionError"),
    "deletes a tree": ("import shutil; shutil.rmtree('{folder}')", "PermissionError"),
    "reads a file": ("open('{folder}/victim').read()", "PermissionError"),
    "reads the accounts": ("open('/etc/passwd').read()", "PermissionError"),
    "reads the parent's environment": ("import os; open(f'/proc/{{os.getppid()}}/environ').read()", "PermissionError"),
    "lists a folder": ("import os; os.listdir('{folder}')", "PermissionError"),
    "runs a program": ("import subprocess; subprocess.run(['touch', '{folder}/made'])", "PermissionError"),
    "runs a shell": ("import os; os.system('touch {folder}/made')", "PermissionError|None"),
    "becomes a program": ("import os; os.execv('/bin/sh', ['sh', '-c', 'touch {folder}/made'])", "PermissionError"),
    "forks": ("import os; os.fork()", "PermissionError"),
    "forks without end": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", _TOO_SLOW),
    "starts a thread": ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
    "connects": ("import socket; socket.create_connection(('127.0.0.1', {port}))", "PermissionError"),
    "connects through C": ("import _socket; _socket.socket()", "PermissionError"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "kills the test": ("import os; os.kill({test}, 15)", "PermissionError"),
    "kills everything": ("import os; os.killpg(0, 9)", "PermissionError"),
    "puts the alarm off": ("import signal; signal.setitimer(0, 0)\nwhile True: pass", "itimer_error|PermissionError"),
    "ignores the alarm": ("import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)", "PermissionError"),
    "blocks the alarm": ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [14])", "PermissionError"),
    "lifts its limits": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "PermissionError|Error"),
    "calls C": ("import ctypes; ctypes.CDLL(None).system(b'touch {folder}/made')", "PermissionError|None"),
    "exits": ("exit()", "SystemExit|NameError"),
    "exits with 0": ("raise SystemExit(0)", "SystemExit"),
    "ends at once": ("import os; os._exit(0)", "ended its process .exit status 0"),
    "crashes": ("import ctypes; ctypes.string_at(0)", _OTHER),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "recurses for good": ("import sys; sys.setrecursionlimit(10**9)\ndef f(x): f([x])\nf(0)", f"{_OTHER}|{_TOO_SLOW}|memory"),
    "computes for ever": ("9**9**9**9", f"{_TOO_SLOW}|memory"),
    "loops for ever": ("while True: pass", _TOO_SLOW),
    "sleeps for ever": ("import time\nwhile True:\n    try: time.sleep(1000)\n    except BaseException: pass", _TOO_SLOW),
    "generates for ever": ("sum(1 for _ in iter(int, 1))", _TOO_SLOW),
    "fills memory": ("x = [bytearray(1 << 24) for _ in range(10**6)]", f"needed more memory|{_TOO_SLOW}"),
    "fills memory at once": ("bytearray(1 << 40)", "needed more memory"),
    "prints without end": ("print('x' * 10**7); import os; os.write(1, b'[1.0, null]\\n'); os.write(2, b'x')", 0.25),
    "writes a forged list": ("import os; os.write(3, b'{{}}\\n')", "something else than a number"),
    "writes no number": ("import os; os.write(3, b'[NaN, null]\\n')", "something else than a number"),
    "writes a pickle": ("import os, pickle; os.write(3, pickle.dumps(1.0) + b'\\n')", "something else"),
    "writes too much": ("import os\nwhile True: os.write(3, b'x' * 4096)", _OTHER + "|took longer|gave no"),
    "looks for other descriptors": (
        "import os\nfor n in range(4, 200):\n    try: os.write(n, b'x'); score = 1.0\n    except OSError: pass", 0.25
    ),
    "scores nothing": ("score = 'nan'", "scored nan"),
    "raises its own": ("class E(Exception):\n    def __repr__(self): raise SystemExit\nraise E", "raised E"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["all layers", "no audit hook", "no Landlock"])
def sealed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every hostile text executed in one sealed server, and what its surroundings look like afterwards; once with the operating
    system's layers alone, and once without Landlock, where no file can be opened, not even a module's.
    """
    folder = tmp_path_factory.mktemp("surroundings")
    (folder / "victim").write_text("as it was")
    listener = socket.create_server(("127.0.0.1", 0))
    values = {"folder": folder, "port": listener.getsockname()[1], "test": os.getpid()}
    items = [[name, text.format(**values)] for name, (text, _) in HOSTILE.items()]
    order = {"items": items, "seconds": 0.7, "memory": 200 << 20, "parallel": 2, "apart": True}
    order |= {"hook": request.param != "no audit hook", "landlock": request.param != "no Landlock"}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sealed_process.py"))],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=400,
        env={"PYTHONPATH": str(ROOT)},
        check=False,
    )
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stderr[-2000:]
    listener.settimeout(0)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    found = json.loads(done.stdout)
    return {
        "folder": folder,
        "seconds": seconds,
        "results": dict(zip(HOSTILE, found["results"], strict=True)),
        "layers": found["layers"],
        "stderr": done.stderr,
        "more": "|PermissionError|ModuleNotFoundError|ImportError" if request.param == "no Landlock" else "",
    }


@pytest.mark.long
@sealed_here
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_is_stopped(sealed: dict[str, Any], name: str) -> None:
    value, reason = sealed["results"][name]
    expected = HOSTILE[name][1]
    if isinstance(expected, float):
        assert (value, reason) == (expected, None)
    else:
        # A call that only reports that it failed leaves the text its own result: nothing was done all the same, see below.
        assert not value or ("None" in expected and value == 0.25), f"{name}: scored {value}"
        assert re.search(expected + sealed["more"], str(reason)), f"{name}: {reason}"


@sealed_here
def test_nothing_around_the_texts_was_touched(sealed: dict[str, Any]) -> None:
    folder: Path = sealed["folder"]
    assert [p.name for p in folder.iterdir()] == ["victim"] and (folder / "victim").read_text() == "as it was"
    assert "seccomp" in sealed["layers"] and sealed["stderr"] == ""
    assert sealed["seconds"] < 400
    assert not _processes_with("sealed_process.py"), "processes were left"


def _processes_with(words: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in line and str(ROOT) in line:
            found.append(line)
    return found


EVALUATING = (
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
)  # fmt: skip


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """Data sets whose scorers evaluate what the policy writes."""
    return {
        name: load_task(TaskConfig(name=name, size=2, heldout_size=0, reward_timeout=1.0, reward_memory=1 << 28))
        for name in EVALUATING
    }


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "made"
    assert not (tmp_path / "made").exists(), "a completion made a file"


def _rewards(task: Task, texts: list[str]) -> list[float]:
    """By the way an analysis takes: a reward function of a task, called by sampling.score."""
    row = task.train[0]
    answers = tuple(RolloutSequence((1,), (2,), completion=text, prompt_row=row) for text in texts)
    rollouts = score(Rollouts(answers), task.reward_functions)
    assert all(isinstance(r, float) for r in rollouts.reward)
    return [float(r or 0.0) for r in rollouts.reward]


EVALUATED = (
    "__import__('os').system('touch {marker}')",
    "open('{marker}', 'w')",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "eval(\"open('{marker}', 'w')\")",
    "exec(\"open('{marker}', 'w')\")",
    "exit()",
    "(lambda: 1)()",
    "sympify(\"open('{marker}', 'w')\")",
    "lambdify('x', \"open('{marker}', 'w')\")(1)",
    "preview('x', output='png', viewer='file', filename='{marker}')",
    "Symbol('x').func.__init__.__globals__",
    "Integer(1).__class__",
    "getattr(1, 'real')",
    "[[__import__('os')._exit(0)]]",
    "__builtins__",
    "print(1)",
)


@pytest.mark.long
@pytest.mark.parametrize("name", EVALUATING)
def test_scorers_that_evaluate_give_honest_rewards_and_run_nothing(
    tasks: dict[str, Task], marker: Path, name: str
) -> None:
    task = tasks[name]
    texts = [text.format(marker=marker) for text in EVALUATED]
    hostile = _rewards(task, texts)
    assert max(hostile) < 0.2, dict(zip(texts, hostile, strict=True))
    answer = task.train[0]["answer"]
    if answer:
        assert _rewards(task, [answer, *texts[:1], answer])[::2] == [1.0, 1.0], "an honest answer is worth less"


def test_rewards_are_those_of_the_scorer_itself() -> None:
    """Honest and half-honest texts, through the guard and the sandbox, against the data set's own scorer in this process."""
    from reasoning_gym.factory import DATASETS

    from rl_training.tasks.reasoning_gym_problems import create_dataset, draw_entries

    for name in (
        "countdown",
        "simple_integration",
        "spiral_matrix",
        "n_queens",
        "chain_sum",
    ):
        assert name in DATASETS
        task = load_task(TaskConfig(name=name, size=3, heldout_size=0, reward="score_answer"))
        dataset = create_dataset(name, {}, 0, 3)
        entries = draw_entries(dataset, 3)
        other = task.train[1]["answer"]
        texts = [
            str(entries[0]["answer"]),
            str(other),
            "",
            "1 + 1",
            "2*x + 3",
            "x**2/2 + C",
            "sqrt(x)",
            "[1, 2]",
            "f(x)",
        ]
        expected = [float(dataset.score_answer(text, entries[0])) for text in texts]
        assert _rewards(task, texts) == expected, name


def test_a_completion_cannot_forge_the_next_ones_rewards(tasks: dict[str, Task]) -> None:
    """Were they evaluated in one process, the second text would find what the first left there."""
    texts = ["[[setattr(__import__('json'), 'dumps', lambda *_: '[1.0, null]')]]", "1", "2"]
    assert max(_rewards(tasks["n_queens"], texts)) < 0.2


def test_endless_texts_end_in_any_thread_with_one_warning(
    tasks: dict[str, Task], caplog: pytest.LogCaptureFixture
) -> None:
    found: list[float] = []
    texts = ["9**9**9**9", "9**9**9**9", tasks["countdown"].train[0]["answer"]]
    begun = time.monotonic()
    thread = threading.Thread(target=lambda: found.extend(_rewards(tasks["countdown"], texts)))
    thread.start()
    thread.join(200)
    assert found == [0.0, 0.0, 1.0] and time.monotonic() - begun < 200
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and "countdown_score" in said[0] and "'9**9**9**9' took longer than 1 s" in said[0]


def test_a_failure_stops_where_that_is_configured() -> None:
    config = TaskConfig(name="countdown", size=2, heldout_size=0, reward_timeout=0.5, on_reward_error="raise")
    with pytest.raises(
        UserError, match=r"countdown_score: scoring '9.*took longer than 0.5 s: set task.on_reward_error"
    ):
        _rewards(load_task(config), ["9**9**9**9"])


def test_math_verify_is_limited_in_any_thread(marker: Path) -> None:
    scorer = SandboxedScorer("math_verify", mathematics_server(), RewardLimits(seconds=1.0), apart=True)
    nested = "$" + "{" * 3000 + "1" + "}" * 3000 + "$"
    texts = [
        "It is 1/2", "9**9**9**9**9", "$9^{9^{9^{9}}}$", f"__import__('os').system('touch {marker}')", nested,
        "\\boxed{" * 200, "1" * 20_000, "(" * 2_000, "$\\frac" * 3_000, "\\boxed{exit()}", "\\boxed{0.5}",
    ]  # fmt: skip
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(scorer.score([["0.5", text] for text in texts])))
    thread.start()
    thread.join(120)
    assert found[0] == found[-1] == 1.0 and not any(found[1:-1]) and len(found) == len(texts)


@pytest.mark.long
def test_a_sandbox_that_died_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(TaskConfig(name="countdown", size=2, heldout_size=0))
    (reward,) = task.reward_functions
    row = task.train[0]
    columns = {"prompts": ["?"], "completions": [row["answer"]], "prompt_index": [row["prompt_index"]]}
    assert reward(**columns) == [1.0]
    server = next(c.cell_contents for c in reward.__closure__ if isinstance(c.cell_contents, SandboxedScorer))._server
    os.kill(server._pid, signal.SIGKILL)
    assert reward(**columns) == [1.0]
    zygote = client._zygote()
    assert zygote._process is not None
    os.kill(zygote._process.pid, signal.SIGKILL)
    assert reward(**columns) == reward(**columns) == [1.0]

    def gone(*_: Any) -> Any:
        raise client.ServerEnded("ended")

    monkeypatch.setattr(server, "ask", gone)
    assert reward(**columns) == [0.0], "what cannot be scored earns nothing"


def test_problems_that_take_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_training.tasks.sandbox import scoring

    monkeypatch.setattr(scoring, "_SETUP_SECONDS", 1.0)
    with pytest.raises(UserError, match="makes the task's problems took longer than 1 s: make task.size"):
        load_task(
            TaskConfig(name="chain_sum", arguments={"min_terms": 10**7, "max_terms": 10**7}, size=9, heldout_size=0)
        )


@pytest.mark.long
def test_the_sandbox_leaves_nothing_behind(tmp_path: Path) -> None:
    """A process that used it and ended, one way or another: no process and no folder of the sandbox remains."""
    code = (
        "import os, sys; from rl_training.config import TaskConfig; from rl_training.tasks.task import load_task\n"
        "load_task(TaskConfig(size=2, heldout_size=0)).reward_functions[0]"
        "(prompts=['?'], completions=['1'], prompt_index=[0])\n"
        "print([load_task(TaskConfig(name=name, size=3, heldout_size=0)).train for name in ('list_functions', 'word_ladder')])\n"
        "sys.stdout.flush()\n"
        "if len(sys.argv) > 1: os.kill(os.getpid(), 9)\n"
    )
    problems = set()
    for extra in ([], ["die"]):
        environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONHASHSEED": str(len(extra))}
        done = subprocess.run(
            [sys.executable, "-c", code, *extra],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert "list" in done.stdout, done.stderr[-2000:]
        problems.add(done.stdout)
        end = time.monotonic() + 120
        while list(tmp_path.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not list(tmp_path.iterdir())
    assert len(problems) == 1, "another process makes other problems: an analysis would have another task than the run"


@pytest.mark.parametrize(
    "code", ["Symbol ('x')+Integer (2 )", "sin (Symbol ('x'))/sqrt (Integer (2 ))", "Function ('f')(Symbol ('x'))"]
)
def test_the_guard_lets_mathematics_through(code: str) -> None:
    import sympy

    refuse_more_than_mathematics(code, {}, vars(sympy))


@pytest.mark.parametrize(
    "code",
    [
        "Symbol ('x').func", "Symbol ('x')[0]", "lambda: 1", "[i for i in Symbol ('x')]", "'text'", "Symbol ('x', 'y')",
        "open (Integer (1 ))", "lambdify (Symbol ('x'),Symbol ('x'))", "f'{Symbol}'", "(y := 1)", "Symbol", "print ()",
        "Function ('f')(Symbol ('x'))(lambda: 1)", "sqrt (open ())",
    ],
)  # fmt: skip
def test_the_guard_stops_everything_else(code: str) -> None:
    import sympy

    if code == "Symbol":
        refuse_more_than_mathematics(code, {}, vars(sympy))  # a bare name does nothing
        return
    with pytest.raises((ValueError, SyntaxError)):
        refuse_more_than_mathematics(code, {}, vars(sympy) | {"open": open, "print": print})


def test_builtin_rewards_that_only_compare_need_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_zygote", lambda: pytest.fail("a process was started"))
    assert rewards.exact(["?"], ["7"], answer=["7"]) == rewards.last_number(["?"], ["7"], answer=["7"]) == [1.0]
