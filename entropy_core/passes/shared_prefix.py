"""Sequences that begin alike in one row, so that what they share passes through the model once.

    row        p_1 ... p_P   a_1 ... a_T-1   b_1 ... b_U-1        (a, b two completions of the prompt p)
    position   0 ... P-1     P ... P+T-2     P ... P+U-2
    attends    p before it   p, a before it  p, b before it

A completion's last drawn token is predicted but predicts nothing, so it is left out of the row, with what follows it. Foreign
tokens between drawn ones stand in the completion's stretch like its own; only drawn ones are predicted. Prompts that differ but
begin alike (a system prompt, a template) can share that beginning in the same way, one level up: `common_prefix_buckets`. For a
causal model whose only paths between positions are attention and position ids, logits are those of separate rows, up to the
order of sums; `shares_prefixes` finds out whether a model is one. Of C completions of T tokens each, a row computes P + C T
tokens where separate rows compute C (P + T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_core.batch import DEFAULT_TOKEN_BATCH_SIZE, Bucket, SequenceBatch, length_buckets
from entropy_core.passes.frozen_head import completion_values
from entropy_core.passes.state import open_passes

# Largest difference of a log-probability, relative to its size (at least 1 nat), that rounding explains.
_TOLERANCE = 1e-4
# Of a gradient, relative to its norm; and how many of its elements are compared.
_GRADIENT_TOLERANCE = 1e-3
_MOST_ELEMENTS = 2**22


def shared_prefix_buckets(batch: SequenceBatch, token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE) -> list[Bucket]:
    """Buckets of rows that hold all completions of a prompt each, at most `token_batch_size` padded tokens in a bucket.

    A prompt whose completions do not fit into `token_batch_size` gets several rows. No row holds two prompts, so that
    gradient rows are those of prompts.
    """
    rows = [_row(batch, 0, members) for members in _of_prompts(batch, token_batch_size)]
    return _cut(rows, token_batch_size, batch.device)


def common_prefix_buckets(
    batch: SequenceBatch, token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE, tokens_per_row: int = 384
) -> list[Bucket]:
    """The same with several prompts in a row, behind the tokens that all prompts of the batch begin with.

    For token statistics, not for gradient rows. tokens_per_row: attention costs its square.
    """
    prompts = [prompt for prompt, _ in _by_prompt(batch)]
    common = 0
    while all(len(p) > common + 1 and p[common] == prompts[0][common] for p in prompts):
        common += 1
    rows: list[list[int]] = []
    used, lengths = tokens_per_row, _stretches(batch)
    for prompt, members in _by_prompt(batch):
        needed = len(prompt) - common + sum(lengths[n] for n in members)
        if used + needed > tokens_per_row:
            rows.append([])
            used = common
        rows[-1] += members
        used += needed
    return _cut([_row(batch, common, members) for members in rows], token_batch_size, batch.device)


@dataclass(frozen=True)
class _Row:
    """blocks: of each token the stretch it belongs to; parents: of each stretch the one that it continues, -1 for the first.
    tokens: for each completion token the position of its logits, the token, its sequence and its column in the batch.
    first: the row's first sequence.
    """

    ids: list[int]
    positions: list[int]
    blocks: list[int]
    parents: list[int]
    tokens: list[tuple[int, int, int, int]]
    first: int


def _by_prompt(batch: SequenceBatch) -> list[tuple[tuple[int, ...], list[int]]]:
    prompts: dict[tuple[int, ...], list[int]] = {}
    for n in range(len(batch)):
        prompts.setdefault((int(batch.prompt_index[n]), *_prompt(batch, n)), []).append(n)
    return [(key[1:], members) for key, members in prompts.items()]


def _prompt(batch: SequenceBatch, n: int) -> list[int]:
    return batch.input_ids[n][batch.prompt_mask[n]].tolist()


def _stretches(batch: SequenceBatch) -> list[int]:
    """Tokens of each completion from the first that was drawn to the last."""
    return (batch.scored_lengths - batch.prompt_mask.sum(1)).tolist()


def _of_prompts(batch: SequenceBatch, limit: int) -> list[list[int]]:
    lengths = _stretches(batch)
    groups: list[list[int]] = []
    for prompt, members in _by_prompt(batch):
        used = limit
        for n in members:
            if used + lengths[n] > limit or not groups:
                groups.append([])
                used = len(prompt)
            groups[-1].append(n)
            used += lengths[n]
    return groups


def _row(batch: SequenceBatch, common: int, members: list[int]) -> _Row:
    """Sequences `members` behind the first `common` tokens of their prompts, which are equal."""
    first = _prompt(batch, members[0])[:common]
    row = _Row(list(first), list(range(common)), [0] * common, [-1], [], members[0])
    prompt: list[int] | None = None
    block = start = 0
    for n in members:
        if _prompt(batch, n) != prompt:
            prompt = _prompt(batch, n)
            start, block = len(row.ids), len(row.parents)
            _append(row, prompt[common:], common, 0)
        assert prompt is not None
        columns = batch.completion_mask[n].nonzero()[:, 0].tolist()
        stretch = batch.input_ids[n][columns[0] : columns[-1] + 1].tolist()
        before, own = start + len(prompt) - common - 1, len(row.ids)
        for column in columns:
            k = column - columns[0]
            row.tokens.append((own + k - 1 if k else before, stretch[k], n, column))
        _append(row, stretch[:-1], len(prompt), block)
    return row


def _append(row: _Row, ids: list[int], position: int, parent: int) -> None:
    row.blocks.extend([len(row.parents)] * len(ids))
    row.parents.append(parent)
    row.ids.extend(ids)
    row.positions.extend(range(position, position + len(ids)))


def _cut(rows: list[_Row], token_batch_size: int, device: torch.device) -> list[Bucket]:
    pieces: list[list[_Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if pieces[-1] and (len(pieces[-1]) + 1) * len(row.ids) > token_batch_size:
            pieces.append([])
        pieces[-1].append(row)
    return [_shared_bucket(piece, device) for piece in pieces]


def _attends(row: _Row, length: int) -> Tensor:
    """(length, length) bool: each token to itself, to those before it in its stretch, and to the stretches that it continues."""
    lineage = torch.eye(len(row.parents) + 1, dtype=torch.bool)  # the last stretch is padding
    for block, parent in enumerate(row.parents):
        if parent >= 0:
            lineage[block] |= lineage[parent]
    blocks = torch.full((length,), len(row.parents))
    blocks[: len(row.blocks)] = torch.tensor(row.blocks)
    return lineage[blocks[:, None], blocks[None, :]].tril()


def _shared_bucket(rows: list[_Row], device: torch.device) -> Bucket:
    longest = max(len(row.ids) for row in rows)
    ids, positions = (torch.zeros((len(rows), longest), dtype=torch.long) for _ in range(2))
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)], positions[r, : len(row.ids)] = torch.tensor(row.ids), torch.tensor(row.positions)
    allowed = torch.stack([_attends(row, longest) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row.tokens])
    return Bucket(
        indices=torch.tensor([row.first for row in rows], device=device),
        input_ids=ids.to(device),
        rows=torch.tensor([r for r, row in enumerate(rows) for _ in row.tokens], device=device),
        positions=tokens[:, 0].to(device),
        targets=tokens[:, 1].to(device),
        sequences=tokens[:, 2].to(device),
        columns=tokens[:, 3].to(device),
        position_ids=positions.to(device),
        attention_mask=allowed[:, None].to(device),
    )


def tells_of_sharing(batch: SequenceBatch) -> bool:
    """Whether `shares_prefixes` can find out anything on this batch: some completion must stand, with more than its last token,
    before another one of its prompt that has a token to see it with.
    """
    return any(_seen_tokens(batch, group) for group in _of_prompts(batch, DEFAULT_TOKEN_BATCH_SIZE))


def _seen_tokens(batch: SequenceBatch, group: list[int]) -> int:
    """Tokens of other completions that one of this row's completions would see in a model that does not keep them apart.

    A completion's last token is not in the row, and its first is predicted from the prompt.
    """
    most, before, lengths = 0, 0, _stretches(batch)
    for length in (lengths[n] for n in group):
        most = max(most, before if length > 1 else 0)
        before += length - 1
    return most


def shares_prefixes(model: nn.Module, batch: SequenceBatch) -> bool:
    """Whether this model gives the same numbers and gradients on shared rows: tried on the longest sequences of `batch`, and on
    the prompt whose completions would see most of each other (in a recurrent model or one with convolutions, say).

    The answer holds for sequences no longer than these: a sliding window, which a mask of one's own takes off, shows on
    longer ones alone. False as well where the model refuses such rows, or where nothing can be told (`tells_of_sharing`).
    """
    groups, lengths = _of_prompts(batch, DEFAULT_TOKEN_BATCH_SIZE), batch.scored_lengths
    sharing = [group for group in groups if _seen_tokens(batch, group)]
    if not sharing:
        return False

    def longest(group: list[int]) -> int:
        return int(lengths[group].max())

    tried = {
        tuple(max(sharing, key=lambda group: _seen_tokens(batch, group))),
        tuple(max(sharing, key=longest)),
        tuple(max(groups, key=longest)),
    }
    part = batch.select([n for group in tried for n in group])
    with torch.no_grad(), open_passes(model):
        try:
            shared = _logprobs(model, part, shared_prefix_buckets(part))
        except Exception:  # models refuse a mask they do not know in every possible way; the plain rows below must work
            return False
        apart = _logprobs(model, part, length_buckets(part))
    if not bool(((shared - apart).abs() <= _TOLERANCE * apart.abs().clamp(min=1.0)).all()):
        return False
    return _gradients_agree(model, part)


def _gradients_agree(model: nn.Module, batch: SequenceBatch) -> bool:
    """Whether gradients do as log-probabilities did: a kernel or a module may take another way back than forward.

    Held against each other on the smallest trained tensors, which stand in every layer; one backward pass each.
    """
    parameters = _small_parameters(model)
    if not parameters:
        return True
    with torch.enable_grad(), open_passes(model):
        try:
            shared = _gradient(model, batch, shared_prefix_buckets(batch), parameters)
        except (
            Exception
        ):  # a backward pass may refuse the mask that the forward pass took; the plain rows below must work
            return False
        apart = _gradient(model, batch, length_buckets(batch), parameters)
    return bool((shared - apart).norm() <= _GRADIENT_TOLERANCE * apart.norm())


def _small_parameters(model: nn.Module) -> list[Tensor]:
    """Trained tensors from the smallest up, of _MOST_ELEMENTS together; at least one, where any is trained."""
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    taken, used = [], 0
    for parameter in trained:
        used += parameter.numel()
        if taken and used > _MOST_ELEMENTS:
            break
        taken.append(parameter)
    return taken


def _gradient(model: nn.Module, batch: SequenceBatch, buckets: list[Bucket], parameters: list[Tensor]) -> Tensor:
    """Of a sum of log-probabilities in which no two sequences, and no two tokens, have the same weight; flattened."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for bucket in buckets:
        logprobs = completion_values(model, bucket, batch.temperature, with_entropies=False).logprobs
        weights = (1.0 + 2.0 * bucket.sequences + 0.7 * bucket.columns).cos().to(logprobs)
        found = torch.autograd.grad((weights * logprobs).sum(), parameters, allow_unused=True)
        for into, gradient in zip(total, found, strict=True):
            if gradient is not None:
                into += gradient
    return torch.cat([part.flatten().to(total[0].device) for part in total])


def _logprobs(model: nn.Module, batch: SequenceBatch, buckets: list[Bucket]) -> Tensor:
    out = torch.zeros(batch.input_ids.shape, dtype=torch.float64, device=batch.device)
    for bucket in buckets:
        found = completion_values(model, bucket, batch.temperature, with_entropies=False)
        out[bucket.sequences, bucket.columns] = found.logprobs.double()
    return out
