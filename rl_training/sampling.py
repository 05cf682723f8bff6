"""One collector of rollouts, two policies: an unfiltered evaluation buffer and a filtered training
buffer.

    unfiltered   prompts uniform, every completion kept, no reward looked at: the data distribution
    filtered     prompts by difficulty, groups without reward differences refilled: what gives gradient (filtered_buffer.py)

Completions are drawn from the whole softmax at the stated temperature, the very distribution that
is differentiated afterwards. See docs/theory/double-sampling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, overload

import torch
from torch import nn

from entropy_core.batch import SequenceBatch
from entropy_core.passes.forward import evaluation_mode, input_device
from entropy_core.passes.position_table import check_length
from rl_training.errors import UserError
from rl_training.models.own_settings import model_settings
from rl_training.prompts.chat_prompts import PromptRendering, tokenize_prompts
from rl_training.prompts.endings import Ending, ending
from rl_training.prompts.left_padding import positions_matter
from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.sequences import RolloutSequence
from rl_training.tasks.reward_calls import total_rewards


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution completions come from: softmax(logits / temperature), cut after EOS or
    `max_completion_length`.

    Prompts are rendered as `rendering` says.
    """

    temperature: float
    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    top_k: int = 0
    top_p: float = 1.0
    rendering: PromptRendering = PromptRendering()
    """How prompts become tokens."""

    def __post_init__(self) -> None:
        if self.top_k != 0 or self.top_p != 1.0:
            raise UserError(
                f"top_k={self.top_k}, top_p={self.top_p}: a truncated sampler draws from another distribution than the one "
                "that is differentiated; sample with top_k=0 and top_p=1"
            )
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: it must be positive (greedy decoding has no entropy)")
        if self.max_completion_length < 1:
            raise UserError(f"max_completion_length={self.max_completion_length}: it must be at least 1")


@dataclass(frozen=True)
class Policy:
    """Who draws completions, and how."""

    model: nn.Module
    tokenizer: Any
    sampling_config: SamplingConfig


@dataclass(frozen=True)
class Rollouts(Sequence[RolloutSequence]):
    """Sequences in the order of their batch.

    A column (`prompt_ids`, `reward`, ...) is a list with one entry a sequence.
    """

    sequences: tuple[RolloutSequence, ...] = ()

    @overload
    def __getitem__(self, place: int) -> RolloutSequence: ...

    @overload
    def __getitem__(self, place: slice) -> Rollouts: ...

    def __getitem__(self, place: int | slice) -> RolloutSequence | Rollouts:
        return Rollouts(self.sequences[place]) if isinstance(place, slice) else self.sequences[place]

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, keep: Iterable[int]) -> Rollouts:
        """The sequences at these places, in this order."""
        return Rollouts(tuple(self.sequences[i] for i in keep))

    def with_values(self, **columns: Iterable[Any]) -> Rollouts:
        """The same sequences with other values of the fields named, one for each sequence.

        Raises:
            ValueError: other counts.
        """
        rows = zip(*columns.values(), strict=True)
        pairs = zip(self.sequences, rows, strict=True)
        return Rollouts(tuple(replace(s, **dict(zip(columns, row, strict=True))) for s, row in pairs))

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [list(s.prompt_ids) for s in self.sequences]

    @property
    def completion_ids(self) -> list[list[int]]:
        return [list(s.completion_ids) for s in self.sequences]

    @property
    def drawn(self) -> list[list[bool] | None]:
        """Which tokens of each completion the policy drew; None where it drew every one."""
        return [None if s.drawn is None else list(s.drawn) for s in self.sequences]

    @property
    def prompt_index(self) -> list[int]:
        """Numbers of the prompts. Raises ValueError where a sequence has none."""
        numbers = [s.prompt_index for s in self.sequences if s.prompt_index is not None]
        if len(numbers) != len(self):
            raise ValueError(f"{len(self) - len(numbers)} of {len(self)} sequences have no prompt_index")
        return numbers

    @property
    def prompt(self) -> list[str]:
        return [s.prompt for s in self.sequences]

    @property
    def completion(self) -> list[str]:
        return [s.completion for s in self.sequences]

    @property
    def prompt_row(self) -> list[dict[str, Any]]:
        """The task's rows; {} where a sequence has none."""
        return [s.prompt_row or {} for s in self.sequences]

    @property
    def reward(self) -> list[float | None]:
        return [s.reward for s in self.sequences]

    @property
    def status(self) -> list[str]:
        return [s.status for s in self.sequences]

    @property
    def lengths(self) -> list[int]:
        """T of every completion: the tokens in it that the policy drew."""
        return [s.length for s in self.sequences]

    def endings(self, sampling_config: SamplingConfig) -> list[Ending]:
        """How every completion came to its end (rl_training.prompts.endings)."""
        return [ending(s.completion_ids, s.drawn, sampling_config.eos_token_ids) for s in self.sequences]

    def to_batch(self, sampling_config: SamplingConfig) -> SequenceBatch:
        """The sequences as tensors, padded on the right; row i is sequence i."""
        return SequenceBatch.from_sequences(
            self.prompt_ids,
            self.completion_ids,
            self.prompt_index,
            sampling_config.pad_token_id,
            sampling_config.temperature,
            self.drawn,
        )


def make_sampling_config(
    model: nn.Module, tokenizer: Any, temperature: float, max_completion_length: int, top_k: int = 0, top_p: float = 1.0
) -> SamplingConfig:
    """The sampling configuration with the model's own end-of-sequence tokens (all of them, as
    generation stops at any).

    Args:
        tokenizer: or a processor that holds one.
    """
    tokenizer = text_tokenizer(tokenizer)
    config_ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = config_ids if isinstance(config_ids, list | tuple) else [config_ids]
    eos = {int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}
    if not eos:
        raise UserError("neither the tokenizer nor the model names an end-of-sequence token: set tokenizer.eos_token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos)
    return SamplingConfig(temperature, max_completion_length, tuple(sorted(eos)), pad, top_k, top_p)


def generate_completions(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    sampling_config: SamplingConfig,
    seed: int,
    batch_size: int = 64,
) -> list[list[int]]:
    """One completion a prompt, drawn from the distribution of `sampling_config`; the global random
    streams are left as they were.

    The model's own generation settings are not used. Prompts run in batches of similar length, and
    of equal length where padding changes what the model draws. Deterministic for the same model,
    prompts, batch size and seed.
    """
    completions: list[list[int]] = [[] for _ in prompt_ids]
    for part, tokens, _ in _drawn(model, prompt_ids, sampling_config, seed, batch_size):
        for i, row in zip(part, tokens, strict=True):
            completions[i] = _until_eos(row, sampling_config)
    return completions


def generate_scored(
    model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling_config: SamplingConfig, seed: int
) -> list[tuple[list[int], list[float]]]:
    """Completions as `generate_completions` draws them, each with the log-probabilities (nats) that its tokens had when they
    were drawn: memory for logits of all of them at once.
    """
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in prompt_ids]
    for part, tokens, logprobs in _drawn(model, prompt_ids, sampling_config, seed, len(prompt_ids), scored=True):
        for i, row, values in zip(part, tokens, logprobs, strict=True):
            kept = _until_eos(row, sampling_config)
            found[i] = kept, values[: len(kept)]
    return found


def _drawn(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    sampling_config: SamplingConfig,
    seed: int,
    batch_size: int,
    scored: bool = False,
) -> Iterator[tuple[list[int], list[list[int]], list[list[float]]]]:
    """(places among the prompts, tokens of each, their log-probabilities where `scored`), a batch at a time."""
    _refuse_too_long(model, prompt_ids, sampling_config)
    config, device, pad = _generation_config(sampling_config), input_device(model), sampling_config.pad_token_id
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    devices = sorted({str(p.device) for p in model.parameters() if p.device.type == "cuda"})
    config.return_dict_in_generate = config.output_scores = scored
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        evaluation_mode(model),
        _no_settings_of_its_own(model),
    ):
        torch.manual_seed(seed)
        _check_logits(model, prompt_ids[order[0]])  # the shortest
        for part in _parts(model, prompt_ids, order, batch_size, pad):
            ids, mask = (t.to(device) for t in _left_padded([prompt_ids[i] for i in part], pad))
            out: Any = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            tokens = (out.sequences if scored else out)[:, ids.shape[1] :]
            logprobs: list[list[float]] = []
            if scored:
                scores = torch.stack(out.scores, 1).float().log_softmax(-1)
                logprobs = scores.gather(2, tokens[..., None].to(scores.device))[..., 0].tolist()
            yield part, tokens.tolist(), logprobs


def _generation_config(sampling_config: SamplingConfig) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=sampling_config.temperature,
        top_k=sampling_config.top_k,
        top_p=sampling_config.top_p,
        max_new_tokens=sampling_config.max_completion_length,
        eos_token_id=list(sampling_config.eos_token_ids) or None,
        pad_token_id=sampling_config.pad_token_id,
    )


def _refuse_too_long(model: nn.Module, prompt_ids: Sequence[Sequence[int]], sampling_config: SamplingConfig) -> None:
    longest = max(map(len, prompt_ids), default=0)
    try:
        check_length(model, longest + sampling_config.max_completion_length - 1)
    except ValueError as error:
        raise UserError(
            f"prompts of up to {longest} tokens with completions of {sampling_config.max_completion_length}: {error}"
        ) from error


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), so that completions begin in one column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def _parts(
    model: nn.Module, prompt_ids: Sequence[Sequence[int]], order: list[int], batch_size: int, pad_token_id: int
) -> list[list[int]]:
    """`order`, by length, in batches.

    `generate` passes positions, so that only a padding that is seen all the same matters.
    """
    lengths = [len(prompt_ids[i]) for i in order]
    padded = lengths[0] != lengths[-1]
    if padded and positions_matter(model, prompt_ids[order[-1]], pad_token_id).kind == "always":
        runs = [list(run) for _, run in groupby(order, key=lambda i: len(prompt_ids[i]))]
    else:
        runs = [order]
    return [run[start : start + batch_size] for run in runs for start in range(0, len(run), batch_size)]


def _no_settings_of_its_own(model: nn.Module) -> AbstractContextManager[None]:
    # `generate` takes whatever is left open (a repetition penalty, min_p, stop strings) from the
    # model's generation_config.
    from transformers import GenerationConfig

    return model_settings(model, GenerationConfig())


def _check_logits(model: nn.Module, prompt: Sequence[int]) -> None:
    # Sampling from NaN ends in an error deep inside torch, on a GPU in one that takes the whole
    # process along.
    ids = torch.tensor([list(prompt)], device=input_device(model))
    if bool(model(input_ids=ids).logits[:, -1].isnan().any()):
        raise UserError(
            "the model gave NaN or infinite logits on the first prompt, so nothing can be sampled: its weights are broken (check "
            "the checkpoint and its base model), or the numbers overflowed (load the model in float32)"
        )


def _until_eos(tokens: list[int], sampling_config: SamplingConfig) -> list[int]:
    ends = [k for k, token in enumerate(tokens) if token in sampling_config.eos_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def prompt_text(prompt: Any) -> str:
    """What a reader is shown of a prompt: the text, or the last user message of a chat."""
    if isinstance(prompt, str):
        return prompt
    users = [m["content"] for m in prompt if m.get("role") == "user"]
    return str(users[-1] if users else prompt[-1]["content"])


def draw(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    completions_per_prompt: int,
    sampling_config: SamplingConfig,
    seed: int,
    status: str,
) -> Rollouts:
    """`completions_per_prompt` completions of each task row, in order, without looking at any
    reward.
    """
    repeated = [row for row in rows for _ in range(completions_per_prompt)]
    ids = [
        tokens
        for tokens in tokenize_prompts(tokenizer, [r["prompt"] for r in rows], sampling_config.rendering)
        for _ in range(completions_per_prompt)
    ]
    completions = generate_completions(model, ids, sampling_config, seed)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollouts(
        tuple(
            RolloutSequence(
                tuple(prompt),
                tuple(completion),
                prompt_index=int(row["prompt_index"]),
                prompt=prompt_text(row["prompt"]),
                completion=text,
                prompt_row=row,
                status=status,
            )
            for prompt, completion, row, text in zip(ids, completions, repeated, texts, strict=True)
        )
    )


def score(rollouts: Rollouts, reward_functions: Sequence[Callable[..., Any]], trainer_state: Any = None) -> Rollouts:
    """The sequences with `reward`: the sum of the reward functions that judge a completion, called
    by TRL's contract; None where none does.

    Args:
        trainer_state: as the functions are to see it; see rl_training/tasks/reward_calls.py.
    """
    if not len(rollouts):
        return rollouts
    conversational = not isinstance(rollouts.prompt_row[0]["prompt"], str)
    shown = [[{"role": "assistant", "content": c}] if conversational else c for c in rollouts.completion]
    columns = {key: [row.get(key) for row in rollouts.prompt_row] for key in rollouts.prompt_row[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rollouts.prompt_row]
    rewards = total_rewards(reward_functions, prompts, shown, rollouts.completion_ids, columns, trainer_state)
    return rollouts.with_values(reward=rewards)
