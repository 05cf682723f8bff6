"""Every parser that is ours: sound files of its kind, and how it is asked to read a changed one."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from rl_training.errors import UserError
from tests.fuzz.mutants import EITHER, Strategy, changed_bytes, changed_json

SEEDS = Path(__file__).parent / "seeds"
Reader = Callable[[bytes, Path], Any]


@dataclass(frozen=True)
class Target:
    """seeds: sound contents, made when first asked. read: of a content, in an empty folder. refusals: what it may raise."""

    name: str
    seeds: Callable[[], Sequence[bytes]]
    read: Reader
    mutants: Strategy = changed_bytes
    refusals: tuple[type[Exception], ...] = (UserError,)
    slow: bool = False


def _written(name: str, read: Callable[[Path], Any]) -> Reader:
    def reader(content: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return reader


# ---------------------------------------------------------------------- pickles and tensors
def _pickles() -> list[bytes]:
    content = {"a": [1, 2.5, None, True], "b": ("x", {"c": b"bytes", 7: 2**70}), "s": {1, 2}}
    return [pickle.dumps(content, protocol=p) for p in (2, 3, 4)]


def _read_pickle(content: bytes, folder: Path) -> Any:
    from entropy_experiments.checkpoints.readers.allowed_names import CHECKPOINT_NAMES
    from entropy_experiments.checkpoints.readers.inert_pickle import read_pickle

    return read_pickle(content, CHECKPOINT_NAMES, lambda pid: pid)


def _torch_files() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        state = {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
            "param_groups": [{"params": [0], "lr": 1e-3}],
        }
        torch.save(state, path)
        return [path.read_bytes()]


def _read_torch(path: Path) -> Any:
    from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor
    from entropy_experiments.checkpoints.readers.torch_file import read_torch_file

    def whole(value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return value.read()
        return (
            [whole(v) for v in (value.values() if isinstance(value, dict) else value)]
            if isinstance(value, dict | list)
            else value
        )

    return whole(read_torch_file(path))


@cache
def _dcp() -> dict[str, bytes]:
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"model": {"w": torch.ones(3, 4), "b": torch.zeros(3)}, "step": 3}, checkpoint_id=folder, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _read_dcp(content: bytes, folder: Path) -> Any:
    from entropy_experiments.checkpoints.readers.dcp_folder import open_dcp

    for name, data in _dcp().items():
        (folder / name).write_bytes(content if name == ".metadata" else data)
    found = open_dcp(folder)
    return [tensor.read() for tensor in found.tensors.values()]


def _read_imported(path: Path) -> Any:
    from entropy_experiments.checkpoints.adapter_file import weight_shapes

    return weight_shapes(path)


def _streams() -> list[bytes]:
    """As entropy_experiments.checkpoints.safetensors_stream writes them."""
    from entropy_experiments.checkpoints.readers.trained_state import LazyTensor
    from entropy_experiments.checkpoints.safetensors_stream import write_tensors

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        values = {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}
        write_tensors(path, {n: LazyTensor(tuple(t.shape), t.dtype, "here", lambda t=t: t) for n, t in values.items()})
        return [path.read_bytes(), save({"b": torch.arange(6.0)}, {"format": "pt"})]


# ---------------------------------------------------------------------- the probe's state
_SETTINGS = {"estimator": "split"}


def _probe_states() -> list[bytes]:
    from entropy_core.fold_gradients import FoldGradients
    from entropy_core.processes import Processes
    from rl_training.probe.probe_state import ProbeState, write_state
    from rl_training.probe.running_gradient import RunningGradient

    gradient = FoldGradients({"w": torch.ones(2, 3)}, Processes(), torch.tensor([0.5, 0.5], dtype=torch.float64))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write_state(
            path, ProbeState({"token": RunningGradient(0.5, gradient, 1.5)}, 1, None, {}, {"step": 3}), _SETTINGS
        )
        return [path.read_bytes()]


def _read_probe(path: Path) -> Any:
    from entropy_core.processes import Processes
    from rl_training.probe.probe_state import read_state

    return read_state(path, _SETTINGS, {"w": torch.zeros(3)}, 0.5, Processes())


# ---------------------------------------------------------------------- text
_ROWS = (
    {"prompt": "1+1=", "completion": "2", "reward": 1.0, "advantage": 0.5, "prompt_index": 0, "step": 3},
    {"step": 1, "prompt": "a", "completion": "b", "even_reward": 1.0, "advantage": -0.5},
    {"input": "a", "output": "b", "score": 1.0, "step": 2, "gts": "2"},
    {"input": "a", "output": "b", "score": 1.0, "step": 2, "gts": None, "uid": "a-b_0_0"},
    {"prompt_ids": [3], "completion_ids": [5, 6], "sampler_logprobs": [-0.5, None], "completion_mask": [1, 0], "weight": 0.1},
    {"step": 1, "sample_idx": 0, "prompt_idx": 0, "prompt_tokens": [3], "response_tokens": [4, 1], "reward": 1.0,
     "advantage": 0.5, "finish_reason": "stop", "logprobs": [-0.1, 0.0], "request_info": {"num_calls": 1}},
    {"task": {}, "group": {"id": "g"}, "traces": [{"ok": True, "calls": [{"sampling": {"temperature": 1.0}}], "rewards": {
        "a": {"score": 1.0, "weight": 2.0}}, "nodes": [
            {"token_ids": [3], "mask": [False]},
            {"parent": 0, "sampled": True, "token_ids": [4], "mask": [True], "logprobs": [-0.1], "advantages": [0.5]},
            {"parent": 1, "sampled": True, "token_ids": [5], "mask": [True], "logprobs": [-0.1], "advantages": [0.5]},
            {"parent": 1, "sampled": True, "token_ids": [6], "mask": [True], "logprobs": [-0.2], "advantages": [0.5]}]}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}], "reward": 0},
)  # fmt: skip


def _lines() -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in _ROWS] + [(json.dumps(_ROWS[0]) + "\n").encode() * 3]


def _read_dump(path: Path) -> Any:
    from entropy_experiments.buffers.dumps.read import import_rollouts

    return import_rollouts(path)


def _parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = []
    for row in (_ROWS[0], _ROWS[3]):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([row, row]), sink)
        out.append(sink.getvalue().to_pybytes())
    return out


def _read_task_lines(path: Path) -> Any:
    from rl_training.tasks.json_lines import json_lines

    return list(json_lines(str(path), "task.path"))


def _yaml() -> list[bytes]:
    from rl_training.config import TrainConfig
    from rl_training.configuration import dump_config, validate_config

    whole = dump_config(validate_config(TrainConfig, {"task": {"name": "chain_sum"}}))
    return [
        whole.encode(),
        b"task: {name: chain_sum}\ntraining:\n  steps: 3\n",
        b"seed: 1\n",
        b"checkpoint: {path: x}\n",
    ]


def _read_configuration(path: Path) -> Any:
    from entropy_experiments.config import FisherAnalysisConfig
    from entropy_experiments.sweep.config import SweepConfig
    from rl_training.config import TrainConfig
    from rl_training.configuration import load_config

    refused = None
    kinds: tuple[type[Any], ...] = (TrainConfig, FisherAnalysisConfig, SweepConfig)
    for kind in kinds:
        try:
            load_config(kind, path)
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def _stored(name: str) -> Callable[[], list[bytes]]:
    return lambda: [(SEEDS / name).read_bytes()]


def _read_sidecar(path: Path) -> Any:
    from entropy_experiments.checkpoints.validation import examine_checkpoint
    from rl_training.run.sidecar import read_sidecar

    read_sidecar(path.parent)
    shutil.copy(SEEDS / "trainer_state.json", path.parent)
    return examine_checkpoint(path.parent, local_files_only=True)


def _read_history(path: Path) -> Any:
    """What an analysis, a resumed run and a resumed probe read of it."""
    from entropy_experiments.records.history import probed_sums, training_history
    from rl_training.probe.history import ProbeHistory
    from rl_training.run.trainer_files import check_resumable_state, read_trainer_state_file

    state = read_trainer_state_file(path)
    rows = training_history(state.get("log_history", []), state)
    probed_sums(rows)
    check_resumable_state(path, state, state["global_step"])
    history = ProbeHistory()
    history.begin(state.get("stateful_callbacks", {}), state["global_step"])
    return history.totals()


def _read_watch(path: Path) -> Any:
    from rl_training.config import EntropyProbeConfig
    from rl_training.probe.watch import EntropyWatch
    from rl_training.probe.watch_state import STATE_KEY, WatchHistory
    from rl_training.run.trainer_files import read_trainer_state_file

    state = read_trainer_state_file(path)
    callbacks = state.get("stateful_callbacks", {})
    if not isinstance(callbacks, dict):
        raise UserError("no record")
    watch = EntropyWatch(EntropyProbeConfig(rollouts="current"), torch.nn.Linear(1, 1))
    trouble = WatchHistory().begin(callbacks, state["global_step"], watch)
    if trouble is not None:
        raise UserError(trouble)
    return callbacks[STATE_KEY]


@cache
def _results() -> dict[str, bytes]:
    from tests.entropy_experiments.results_fixture import build_results

    with tempfile.TemporaryDirectory() as root:
        folder = build_results(Path(root) / "results")
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _read_records(name: str) -> Reader:
    def read(content: bytes, folder: Path) -> Any:
        from entropy_experiments.records.reader import read_results_folder

        for other, data in _results().items():
            if other != "SHA256SUMS":
                (folder / other).write_bytes(content if other == name else data)
        return read_results_folder(folder)

    return read


def _read_sums(path: Path) -> Any:
    from rl_training.run.sums import check_sums

    (path.parent / "a.txt").write_bytes(b"a")
    return check_sums(path.parent, "copy it again")


# ---------------------------------------------------------------------- programs of strangers
@cache
def _tokenizer() -> Any:
    from rl_training.prompts.limited_templates import limited_templates
    from tests.tiny_policy import character_tokenizer

    ExitStack().enter_context(limited_templates())
    return character_tokenizer()


def _templates() -> list[bytes]:
    template = "{% for m in messages %}{{ m['content'] | trim }}|{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    messages = [
        [{"role": "user", "content": "1+1"}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
    ]
    return [json.dumps({"template": template, "messages": m}).encode() for m in messages]


def _read_template(content: bytes, folder: Path) -> Any:
    from rl_training.prompts.chat_prompts import tokenize_prompts

    found = json.loads(content)
    tokenizer = _tokenizer()
    tokenizer.chat_template = str(found.get("template", "x"))
    return tokenize_prompts(tokenizer, [found.get("messages", [])])


def _ggufs() -> list[bytes]:
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_name("tiny")
        writer.add_block_count(1)
        writer.add_embedding_length(8)
        writer.add_head_count(2)
        writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


def _read_gguf(path: Path) -> Any:
    from rl_training.models.gguf import converted_folder

    return converted_folder(path, path.parent / "cache")


def _damaged() -> tuple[type[Exception], ...]:
    from entropy_experiments.checkpoints.readers.inert_pickle import Damaged

    return (Damaged,)


TARGETS = (
    Target("pickle", _pickles, _read_pickle, refusals=_damaged()),
    Target("torch file", _torch_files, _written("x.pt", _read_torch), refusals=(UserError, *_damaged())),
    Target("DCP description", lambda: [_dcp()[".metadata"]], _read_dcp, refusals=(UserError, *_damaged())),
    Target("safetensors header", _streams, _written("x.safetensors", _read_imported)),
    Target("probe state", _probe_states, _written("x.probe", _read_probe), refusals=(ValueError,)),
    Target("dump, lines", _lines, _written("x.jsonl", _read_dump)),
    Target("dump, values", lambda: [json.dumps(r).encode() for r in _ROWS], _written("x.jsonl", _read_dump), changed_json),
    Target("dump, parquet", _parquets, _written("x.parquet", _read_dump)),
    Target("task, lines", _lines, _written("x.jsonl", _read_task_lines)),
    Target("configuration", _yaml, _written("x.yaml", _read_configuration)),
    Target("sidecar", _stored("entropy_experiments.json"), _written("entropy_experiments.json", _read_sidecar), EITHER),
    Target("trainer state", _stored("trainer_state.json"), _written("trainer_state.json", _read_history), EITHER),
    Target("watch state", _stored("trainer_state.json"), _written("trainer_state.json", _read_watch), EITHER),
    Target("records, summary", lambda: [_results()["summary.json"]], _read_records("summary.json"), EITHER),
    Target("records, run", lambda: [_results()["run.json"]], _read_records("run.json"), EITHER),
    Target("records, history", lambda: [_results()["training_history.json"]], _read_records("training_history.json"), EITHER),
    Target("records, sequences", lambda: [_results()["sequences.parquet"]], _read_records("sequences.parquet")),
    Target("records, kernel", lambda: [_results()["kernel.safetensors"]], _read_records("kernel.safetensors")),
    Target("digests", lambda: [b"%s  a.txt\n" % (b"ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb")],
           _written("SHA256SUMS", _read_sums)),
    Target("chat template and messages", _templates, _read_template, changed_json, (UserError,), slow=True),
    Target("GGUF", _ggufs, _written("x.gguf", _read_gguf), slow=True),
)  # fmt: skip
