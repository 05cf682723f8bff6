"""A batch of prompts with their completions, and how it is cut into pieces of similar length.

The tokens of one sequence are ``prompt + completion``. Position ``l`` of ``completion_mask`` is
true where ``input_ids[:, l]`` was drawn by the policy; its log-probability is read from the logits
at position ``l - 1``. The drawn tokens may form several runs: what stands between them, or after
the last (tool results, turns of a user), is *foreign*. Foreign tokens are conditioned on, never
scored, and in no length T (docs/theory/entropy-gradient.md, "Tokens that the policy did not draw").

Inside the library every piece is right-padded, whatever the padding of the batch: for a causal
model a token never sees what stands to its right, so padding cannot change any number (see
docs/theory/index.md).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DEFAULT_TOKEN_BATCH_SIZE = 4096
# Buckets of more tokens than these need not grow: on a CPU they are no faster, elsewhere where more
# than this share is padding.
ENOUGH_TOKENS, _PADDING = 1024, 0.125


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts with completions, as drawn.

    Attributes:
        input_ids: (N, L) int64, prompt and completion, padded on either side.
        attention_mask: (N, L) bool, false on padding.
        completion_mask: (N, L) bool, true on the tokens that the policy drew; one run or several.
        prompt_index: (N,) int64, equal for completions of the same prompt.
        temperature: the sampling temperature; every log-probability and entropy is taken at it.

    Raises:
        ValueError: shapes that disagree, an empty batch, ids or prompt indices that are not whole
            numbers, a negative id, attended tokens that are not one contiguous run, a completion
            that is empty, not attended or at the very first of them (nothing predicts it), or a
            temperature that is not positive and finite.

    Examples:
        >>> prompts, completions = [[1, 2], [1, 2], [3]], [[4, 0], [5, 6, 0], [4]]
        >>> drawn = SequenceBatch.from_sequences(prompts, completions, [0, 0, 1], pad_token_id=0)
        >>> len(drawn), drawn.completion_mask.sum(1).tolist()
        (3, [2, 3, 1])
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    prompt_index: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention_mask", self.attention_mask.bool())
        object.__setattr__(self, "completion_mask", self.completion_mask.bool())
        shape = self.input_ids.shape
        if len(shape) != 2 or shape[0] == 0:
            raise ValueError(f"input_ids must be (N, L) with N > 0, not {tuple(shape)}")
        for name in ("attention_mask", "completion_mask"):
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} is {tuple(getattr(self, name).shape)}, input_ids {tuple(shape)}: they must agree"
                )
        if self.prompt_index.shape != shape[:1]:
            raise ValueError(f"prompt_index is {tuple(self.prompt_index.shape)}, but there are {shape[0]} sequences")
        for name in ("input_ids", "prompt_index"):
            if not _whole(getattr(self, name)):
                raise ValueError(f"{name} must be whole numbers, not {getattr(self, name).dtype}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be positive and finite, not {self.temperature}: greedy decoding has no entropy"
            )
        self._check_completions()

    def _check_completions(self) -> None:
        def first_bad(bad: Tensor, what: str) -> None:
            if bool(bad.any()):
                raise ValueError(f"sequence {int(bad.nonzero()[0, 0])}: {what}")

        attended, completion = self.attention_mask, self.completion_mask
        first_bad(~completion.any(1), "its completion is empty")
        first_bad((completion & ~attended).any(1), "a completion token is masked out by attention_mask")
        # True where a token is attended and the one before it is not: once, if they are one run.
        starts_attended = attended & ~torch.nn.functional.pad(attended, (1, -1), value=False)
        first_bad(starts_attended.sum(1) != 1, "its attended tokens are not one contiguous run")
        first_bad((completion & starts_attended).any(1), "its completion has no token before it to be predicted from")
        first_bad(
            (attended & (self.input_ids < 0)).any(1),
            "a token id is negative: give the tokens themselves (labels have -100 in the place of some), or mask it out",
        )

    @classmethod
    def from_sequences(
        cls,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        prompt_index: Sequence[int],
        pad_token_id: int,
        temperature: float = 1.0,
        drawn: Sequence[Sequence[bool] | None] | None = None,
    ) -> SequenceBatch:
        """Right-padded batch from lists of token ids (one prompt and one completion a sequence).

        Args:
            drawn: for each sequence which tokens of its completion the policy drew, None (of one,
                or of all) where it drew every one.

        Raises:
            ValueError: lists of unequal lengths, or of what is no whole number; and as the class.
        """
        if not len(prompt_ids) == len(completion_ids) == len(prompt_index):
            raise ValueError(
                f"{len(prompt_ids)} prompts, {len(completion_ids)} completions and {len(prompt_index)} prompt indices: "
                "give one of each per sequence"
            )
        drawn = [None] * len(prompt_ids) if drawn is None else drawn
        if len(drawn) != len(prompt_ids):
            raise ValueError(f"{len(prompt_ids)} sequences, but {len(drawn)} masks of drawn tokens: give one of each")
        longest = max((len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)), default=0)
        ids = torch.full((len(prompt_ids), longest), pad_token_id, dtype=torch.long)
        attention = torch.zeros_like(ids, dtype=torch.bool)
        completion = torch.zeros_like(attention)
        for n, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            end = len(p) + len(c)
            ids[n, :end] = _numbers([*p, *c], f"sequence {n}: token ids")
            attention[n, :end] = True
            completion[n, len(p) : end] = _drawn_tokens(n, drawn[n], len(c))
        of = _numbers(prompt_index, "prompt indices, equal for completions of one prompt,")
        return cls(ids, attention, completion, of, temperature)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def completion_lengths(self) -> Tensor:
        """(N,) int64, T: tokens in each completion that the policy drew."""
        return self.completion_mask.sum(1)

    @property
    def prompt_mask(self) -> Tensor:
        """(N, L) bool, true on the tokens before the first that the policy drew."""
        return self.attention_mask & (self.completion_mask.long().cumsum(1) == 0)  # nothing drawn yet

    @property
    def scored_lengths(self) -> Tensor:
        """(N,) int64, tokens up to the last that the policy drew: what stands after it predicts
        nothing.
        """
        columns = torch.arange(1, self.input_ids.shape[1] + 1, device=self.device)
        # Place of the last drawn token (from 1) less the left padding: argmax finds the first maximum.
        return (self.completion_mask * columns).amax(1) - self.attention_mask.long().argmax(1)

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def select(self, indices: Tensor | Sequence[int]) -> SequenceBatch:
        """The sequences at these indices, in this order."""
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.device)
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            completion_mask=self.completion_mask[rows],
            prompt_index=self.prompt_index[rows],
        )

    def to(self, device: torch.device | str) -> SequenceBatch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            completion_mask=self.completion_mask.to(device),
            prompt_index=self.prompt_index.to(device),
        )


def _whole(numbers: Tensor) -> bool:
    return not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)


def _numbers(given: Sequence[int] | Tensor, what: str) -> Tensor:
    """(n,) int64. Raises ValueError for what is not a list of whole numbers."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} must be whole numbers ({error})") from error
    if len(found) and not _whole(found):
        raise ValueError(f"{what} must be whole numbers, not {found.dtype}")
    return found.long()


def _drawn_tokens(sequence: int, drawn: Sequence[bool] | None, length: int) -> Tensor:
    if drawn is None:
        return torch.ones(length, dtype=torch.bool)
    if len(drawn) != length:
        raise ValueError(
            f"sequence {sequence}: its completion has {length} tokens, its mask of drawn ones {len(drawn)}"
        )
    return torch.tensor(drawn, dtype=torch.bool)


@dataclass(frozen=True)
class Bucket:
    """One piece of a batch as the model sees it: right-padded rows, with the place of every
    completion token.

    A row holds one sequence up to its last drawn token (the longest ones without that, which
    predicts nothing); or, where a prefix is shared (entropy_core.passes.shared_prefix), a prompt
    with several completions.

    Attributes:
        indices: (n,) for each row a sequence of the batch (of a shared row, its first).
        input_ids: (n, l) right-padded ids, l one less than the bucket's longest sequence has, or as
            many where n would be l.
        rows, positions: (m,) for each of the bucket's m completion tokens its row in the bucket and
            the position of the logits that predict it.
        targets: (m,) the token ids.
        sequences, columns: (m,) where the token stood in the batch: `batch.input_ids[sequences,
            columns] == targets`.
        position_ids, attention_mask: (n, l) int64 and (n, 1, l, l) bool, true where a token attends
            to another, for rows that share a prefix; None where positions count up and every token
            attends to all before it.
    """

    indices: Tensor
    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    sequences: Tensor
    columns: Tensor
    position_ids: Tensor | None = None
    attention_mask: Tensor | None = None


def pass_order(batch: SequenceBatch) -> Tensor:
    """(N,) indices in the order in which sequences pass through a model: by length, so that rows of
    a bucket are alike.

    Where several completions share a prompt that is longer than they are, they stay together: a
    prompt passes once with all of them (entropy_core.passes.shared_tokens), which saves more than
    their padding costs.
    """
    lengths = batch.scored_lengths
    order = torch.argsort(lengths, stable=True)
    if not _shares_long_prompts(batch):
        return order
    _, prompt = batch.prompt_index.unique(return_inverse=True)
    longest = torch.zeros_like(lengths).scatter_reduce_(0, prompt, lengths, "amax")[prompt]
    for key in (prompt, longest):  # stable: the last key counts first
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _shares_long_prompts(batch: SequenceBatch) -> bool:
    shared = 2 * len(batch.prompt_index.unique()) <= len(batch)
    return shared and 2 * int(batch.prompt_mask.sum()) >= int(batch.scored_lengths.sum())


def length_buckets(
    batch: SequenceBatch, token_batch_size: int = DEFAULT_TOKEN_BATCH_SIZE, fewest: bool = True
) -> list[Bucket]:
    """Cut a batch into buckets of at most `token_batch_size` padded tokens (at least one sequence
    each), in `pass_order`.

    Args:
        fewest: True cuts into as few buckets as that allows, the largest of them (which decides the
            memory) as small as may be. False cuts further, where that saves padding, and on a CPU
            once a bucket is large enough to be fast: passes with gradients then take a part of the
            memory. Completions that share a long prompt are not torn apart for it.
    """
    if token_batch_size < 1:
        raise ValueError(f"token_batch_size must be at least 1, not {token_batch_size}")
    lengths = batch.scored_lengths
    order = pass_order(batch)
    in_order = lengths[order].tolist()
    if fewest:
        ends = _even_ends(in_order, token_batch_size)
    else:
        ends = _ends(in_order, token_batch_size, _may_end(batch, order))
    starts = [0, *ends[:-1]]
    return [_bucket(batch, order[start:end], lengths) for start, end in zip(starts, ends, strict=True)]


def _may_end(batch: SequenceBatch, order: Tensor) -> Callable[[int, int, int], bool]:
    """Whether a bucket may end before place n, given its padded tokens and its tokens with n,
    though there is room for more.
    """
    sharing, on_cpu = _shares_long_prompts(batch), batch.device.type == "cpu"
    prompts = batch.prompt_index[order].tolist()

    def may_end(place: int, padded: int, tokens: int) -> bool:
        apart = not (sharing and prompts[place] == prompts[place - 1])
        return padded > ENOUGH_TOKENS and apart and (on_cpu or padded - tokens > _PADDING * padded)

    return may_end


def _ends(lengths: list[int], most: int, may_end: Callable[[int, int, int], bool] = lambda *_: False) -> list[int]:
    """Where buckets of at most `most` padded tokens end, each as full as that and `may_end` allow."""
    ends: list[int] = []
    start = longest = tokens = 0
    for place, length in enumerate(lengths):
        longest, tokens = max(longest, length), tokens + length
        padded = (place - start + 1) * longest
        if place > start and (padded > most or may_end(place, padded, tokens)):
            ends.append(place)
            start, longest, tokens = place, length, length
    return [*ends, len(lengths)]


def _even_ends(lengths: list[int], most: int) -> list[int]:
    """The ends of as few buckets as `most` allows, with the smallest limit that needs no more of
    them.
    """
    fewest = _ends(lengths, most)
    # A higher limit never needs more buckets, because a part of a bucket never has more tokens than
    # the whole.
    limits = range(1, most + 1)
    return _ends(lengths, limits[bisect_left(limits, -len(fewest), key=lambda limit: -len(_ends(lengths, limit)))])


def _bucket(batch: SequenceBatch, indices: Tensor, lengths: Tensor) -> Bucket:
    longest = int(lengths[indices].max())
    first = batch.attention_mask[indices].long().argmax(1, keepdim=True)
    steps = torch.arange(longest, device=batch.device)
    columns = (first + steps).clamp(max=batch.input_ids.shape[1] - 1)
    ids = batch.input_ids[indices].gather(1, columns)
    within = steps < lengths[indices, None]
    completion = batch.completion_mask[indices].gather(1, columns) & within
    # Padding must hold a legal token id; token 0 always is one, and causality keeps it unseen.
    ids = torch.where(within, ids, torch.zeros_like(ids))
    rows, places = completion.nonzero(as_tuple=True)
    # Never as many sequences as tokens: a module that puts time first is known by its shapes
    # (entropy_core.passes.gradient_hooks).
    width = longest if len(indices) == longest - 1 else longest - 1
    return Bucket(indices, ids[:, :width], rows, places - 1, ids[rows, places], indices[rows], columns[rows, places])
