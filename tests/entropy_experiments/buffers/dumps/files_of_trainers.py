"""The same few sequences as each trainer would have written them down, on the tiny policy's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass
class Sequence:
    """prompt: chat messages; ids as the policy saw and drew them."""

    prompt: list[dict[str, str]]
    prompt_ids: list[int]
    completion_ids: list[int]
    reward: float
    advantage: float
    logprobs: list[float]
    group: int
    mask: list[bool] | None = None


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verl(folder: Path, step: int, sequences: list[Sequence], tokenizer: Any) -> Path:
    """ray_trainer.RayPPOTrainer._log_rollout_data and _dump_generations."""

    def plain(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    rows = [
        {"input": plain(s.prompt_ids), "output": plain(s.completion_ids), "gts": "7", "score": s.reward, "step": step,
         "acc": s.reward > 0}
        for s in sequences
    ]  # fmt: skip
    return lines(folder / f"{step}.jsonl", rows)


def trl(folder: Path, step: int, sequences: list[Sequence], tokenizer: Any) -> Path:
    """GRPOTrainer.log with log_completions."""
    table = {
        "step": [step] * len(sequences),
        "prompt": [s.prompt for s in sequences],
        "completion": [
            [{"role": "assistant", "content": tokenizer.decode(s.completion_ids, skip_special_tokens=True)}]
            for s in sequences
        ],
        "even_start_reward": [s.reward for s in sequences],
        "advantage": [s.advantage for s in sequences],
    }
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table).to_parquet(path)
    return path


def open_instruct(folder: Path, step: int, sequences: list[Sequence], tokenizer: Any) -> Path:
    """rl_utils._save_rollouts."""
    rows = []
    for i, s in enumerate(sequences):
        drawn = s.mask or [True] * len(s.completion_ids)
        rows.append({
            "step": step, "sample_idx": i, "prompt_idx": s.group, "prompt_tokens": s.prompt_ids,
            "response_tokens": s.completion_ids, "reward": s.reward, "advantage": s.advantage,
            "finish_reason": "stop" if s.completion_ids[-1] == tokenizer.eos_token_id else "length",
            "dataset": "chain_sum", "ground_truth": [10],
            "request_info": {"num_calls": 0 if s.mask is None else 1, "timeouts": 0, "tool_errors": "", "tool_outputs": "",
                             "tool_runtimes": 0.0, "tool_calleds": s.mask is not None, "tool_call_stats": [],
                             "rollout_state": {}},
            "logprobs": [q if own else 0.0 for q, own in zip(s.logprobs, drawn, strict=True)],
        })  # fmt: skip
    return lines(folder / "run_rollouts_000000.jsonl", rows)


def prime_rl(folder: Path, step: int, sequences: list[Sequence], tokenizer: Any) -> Path:
    """verifiers' Episode.to_record: an episode a sequence, a node for the prompt and one for each run of drawn tokens."""
    episodes = []
    for s in sequences:
        nodes: list[dict[str, Any]] = [
            {"message": {"role": "user", "content": "?"}, "sampled": False, "timestamp": 1.0,
             "token_ids": s.prompt_ids, "mask": [False] * len(s.prompt_ids), "is_content": [], "logprobs": []}
        ]  # fmt: skip
        drawn = s.mask or [True] * len(s.completion_ids)
        k = 0
        while k < len(drawn):
            end = k
            while end < len(drawn) and not drawn[end]:
                end += 1
            start = end
            while end < len(drawn) and drawn[end]:
                end += 1
            own = end - start
            node = {"parent": len(nodes) - 1, "message": {"role": "assistant", "content": ""}, "sampled": own > 0,
                    "timestamp": 1.0, "token_ids": s.completion_ids[k:end], "mask": drawn[k:end], "is_content": [],
                    "logprobs": s.logprobs[start:end]}  # fmt: skip
            if own:
                node["advantages"] = [s.advantage] * own
            nodes.append(node)
            k = end
        trace = {"version": 1, "id": "t", "task": {"type": "T", "data": {}}, "ok": True, "is_completed": True,
                 "agent": {"config": {}, "name": "agent", "trainable": True}, "tools": [], "nodes": nodes,
                 "calls": [{"node": len(nodes) - 1, "sampling": {"temperature": 1.0}, "finish_reason": "stop",
                            "time": {"start": 0.0, "end": 1.0}}],
                 "rewards": {"exact": {"score": s.reward, "weight": 1.0}}, "metrics": {}, "info": {},
                 "stop_condition": "done", "errors": []}  # fmt: skip
        work = {"type": "train", "step": step, "policy": {"start": step - 1, "end": step - 1}}
        episodes.append({"id": "e", "env": {"id": "chain-sum"}, "task": {"type": "T", "data": {}}, "ok": True,
                         "group": {"id": f"g{s.group}"}, "errors": [], "traces": [trace],
                         "run": {"type": "train", "id": "r", "work": work}})  # fmt: skip
    return lines(folder / "rollouts" / f"step_{step}" / "train" / "effective" / "traces.jsonl", episodes)


def ours(folder: Path, step: int, sequences: list[Sequence], tokenizer: Any) -> Path:
    """The documented schema, as JSONL."""
    rows = [
        {"prompt_ids": s.prompt_ids, "completion_ids": s.completion_ids, "completion_mask": s.mask,
         "advantage": s.advantage, "reward": s.reward, "sampler_logprobs": s.logprobs, "group": s.group, "step": step}
        for s in sequences
    ]  # fmt: skip
    return lines(folder / "rollouts.jsonl", rows)


WRITERS = {"verl": verl, "trl": trl, "open_instruct": open_instruct, "prime_rl": prime_rl, "ours": ours}
