"""prime-rl's episodes: `<run>/rollouts/step_<N>/train/{all,effective}/traces.jsonl` (records of verifiers, version 1).

A line is an episode of one or more traces; a trace is a graph of messages, each with the tokens it adds. Every path from a
root to a leaf is a sequence, as in prime-rl's own batches: concatenated they give the very tokens that the model saw. A reply
that several paths share trains in the first of them, and is context in the others (orchestrator/trajectories.py).

    token_ids, mask         parallel; mask: drawn by the policy
    logprobs, advantages    of the drawn tokens alone

`effective` is what the step trained on, `all` what was generated before anything was rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.rows import RolloutRow, listed, logprobs, mapping, mask, number, positive, tokens

NAME = "prime-rl"
FILES = r"traces\.jsonl"

_CUT = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "context_length")
# Settings of the sampler under which completions are not drawn from softmax(logits / T), with the values that change nothing.
_TRUNCATING = {
    "top_p": (None, 1.0, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0.0, 0),
    "repetition_penalty": (None, 1.0, 1),
}


def matches(keys: set[str]) -> bool:
    """Whether a row of these keys is an episode."""
    return {"traces", "task"} <= keys


def sequences(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
    """The sequences of an episode; none of traces that failed or do not train. Raises ValueError where it is not one."""
    traces = data["traces"]
    if not isinstance(traces, list):
        raise ValueError("traces is no list")
    group = data.get("group")
    group_id = group.get("id") if isinstance(group, dict) else None
    for count, trace in enumerate(traces):
        if not isinstance(trace, dict) or not isinstance(trace.get("nodes"), list):
            raise ValueError(f"trace {count} has no nodes")
        agent = mapping("agent", trace.get("agent"))
        if trace.get("ok") is False or agent.get("trainable") is False:
            continue
        trained: set[int] = set()
        for path in _paths(trace["nodes"]):
            nodes = [_context(trace["nodes"][i]) if i in trained else trace["nodes"][i] for i in path]
            trained.update(i for i, node in zip(path, nodes, strict=True) if node.get("sampled"))
            if any(node.get("sampled") for node in nodes):
                yield _sequence(trace, nodes, f"{place}, trace {count}", group_id, step)


def _context(node: dict[str, Any]) -> dict[str, Any]:
    """A reply that trained in an earlier path."""
    mask_off = [False] * len(listed("token_ids", node.get("token_ids")))
    return {"token_ids": node.get("token_ids"), "mask": mask_off, "loss_weights": node.get("loss_weights")}


def _paths(nodes: list[Any]) -> list[list[int]]:
    """Numbers of the nodes from each root to each leaf."""
    parents = []
    for i, node in enumerate(nodes):
        parent = node.get("parent") if isinstance(node, dict) else i
        if parent is not None and (type(parent) is not int or not 0 <= parent < i):
            raise ValueError(f"node {i} has the parent {str(parent)[:20]}, which is none before it")
        parents.append(parent)
    leaves = [i for i in range(len(nodes)) if i not in set(parents)]
    found = []
    for leaf in leaves:
        path: list[int] = []
        place: int | None = leaf
        while place is not None:
            path.append(place)
            place = parents[place]
        found.append(path[::-1])
    return found


def _sequence(
    trace: dict[str, Any], path: list[dict[str, Any]], place: str, group: Any, step: int | None
) -> RolloutRow:
    ids: list[int] = []
    drawn: list[bool] = []
    recorded: list[float | None] = []
    credits: list[float] = []
    without = 0
    for node in path:
        own = tokens("token_ids", node.get("token_ids") or [])
        own_mask = mask("mask", node.get("mask") or [])
        assert own is not None and own_mask is not None
        if len(own) != len(own_mask):
            raise ValueError(f"a node has {len(own)} token_ids and {len(own_mask)} entries of mask")
        if node.get("sampled") and not any(own_mask):
            raise ValueError("a reply has no token ids of its own: the run's client did not record them")
        if weights := node.get("loss_weights"):
            raise ValueError(f"the loss weighs single tokens ({str(weights)[:40]}): not a weight a sequence")
        sampled = sum(own_mask)
        values = logprobs("logprobs", node.get("logprobs") or [])
        assert values is not None
        if values and len(values) != sampled:
            raise ValueError(f"a node has {sampled} drawn tokens and {len(values)} logprobs")
        values = values or [None] * sampled
        place_of = iter(values)
        recorded += [next(place_of) if own_one else None for own_one in own_mask]
        ids, drawn = ids + own, drawn + own_mask
        if sampled:
            own_credits = _credits(node, sampled)
            without += not own_credits
            credits += own_credits
    if True not in drawn:
        raise ValueError("no token was drawn by the policy")
    if credits and without:
        raise ValueError("some of its replies have advantages and others none: not a weight a sequence")
    start = drawn.index(True)
    calls = [call for call in listed("calls", trace.get("calls")) if isinstance(call, dict) and not call.get("error")]
    return RolloutRow(
        place=place,
        prompt_ids=ids[:start],
        completion_ids=ids[start:],
        completion_mask=None if all(drawn[start:]) else drawn[start:],
        reward=_reward(trace),
        advantage=_one_advantage(credits) if credits else None,
        sampler_logprobs=recorded[start:] if any(v is not None for v in recorded) else None,
        group=None if group is None else str(group),
        step=step,
        temperature=_temperature(calls),
        truncated=trace.get("stop_condition") in _CUT or bool(calls and calls[-1].get("finish_reason") == "length"),
    )


def _credits(node: dict[str, Any], sampled: int) -> list[float]:
    """Advantages of a node's drawn tokens; [] where none were assigned."""
    given = node.get("advantages")
    if given is not None and (not isinstance(given, list) or len(given) != sampled):
        raise ValueError(f"a node has {sampled} drawn tokens and other advantages than one for each")
    return [number("advantages", v) or 0.0 for v in given or []]


def _one_advantage(credits: list[float]) -> float:
    if max(credits) - min(credits) > 1e-6 * max(1.0, abs(credits[0])):
        raise ValueError(
            f"advantages differ from token to token ({min(credits):.3g} to {max(credits):.3g}): not a weight a sequence"
        )
    return credits[0]


def _reward(trace: dict[str, Any]) -> float | None:
    judged = [r for r in mapping("rewards", trace.get("rewards")).values() if isinstance(r, dict)]
    if not judged:
        return None
    return sum(
        (number("score", r.get("score")) or 0.0) * (number("weight", r.get("weight", 1.0)) or 0.0) for r in judged
    )


def _temperature(calls: list[dict[str, Any]]) -> float | None:
    found = set()
    for call in calls:
        sampling = mapping("sampling", call.get("sampling"))
        for name, harmless in _TRUNCATING.items():
            if sampling.get(name) not in harmless:
                raise ValueError(
                    f"was sampled with {name}={str(sampling[name])[:20]}: another distribution than the policy's"
                )
        if (value := positive("temperature", sampling.get("temperature"))) is not None:
            found.add(value)
    if len(found) > 1:
        raise ValueError(f"was sampled at several temperatures ({', '.join(map(str, sorted(found)))})")
    return found.pop() if found else None


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them."""
    traces = [row.place for row in rows]
    extra = len(traces) - len(set(traces))
    if not extra:
        return []
    return [
        f"{extra} sequences are further branches of a trace: a reply that branches share is scored in the first alone"
    ]
