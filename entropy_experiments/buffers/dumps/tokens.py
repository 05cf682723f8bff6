"""The rows of a table as token ids: recorded ones as they are, texts tokenised, with notes of what can differ.

Texts do not give back the tokens that a policy drew: a text can be split otherwise than it was sampled, end-of-sequence tokens
and special tokens are gone, and the chat template is another where its arguments were others. A prompt whose special tokens
were removed is only taken where rendering it anew gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from entropy_experiments.buffers.custom import as_sampled
from entropy_experiments.buffers.dumps.rows import Mistakes, RolloutRow, RolloutTable
from rl_training.errors import UserError
from rl_training.prompts.chat_prompts import PromptRendering, tokenize_prompts
from rl_training.prompts.text_tokenizer import text_tokens
from rl_training.sampling import SamplingConfig

_LONG_ENOUGH = 4  # tokens of prompts that no policy repeats by chance, in every row
_SENTINELS = ("entropysentinelone", "entropysentineltwo")


@dataclass
class TokenizedRows:
    """prompt_ids, completion_ids, drawn: one entry a row. prompts: messages or text, for a reader. notes: what can differ."""

    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    drawn: list[list[bool] | None] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tokenize_rows(
    table: RolloutTable,
    tokenizer: Any,
    sampling_config: SamplingConfig,
    system_prompt: str | None = None,
    task_prompts: Sequence[Any] = (),
    vocabulary: int | None = None,
) -> TokenizedRows:
    """Token ids of every row.

    Args:
        table: The rows.
        tokenizer: The policy's.
        sampling_config: Which tokens end a completion, its maximum length, and how prompts are rendered.
        system_prompt: Goes before prompts that are a text for the chat template to go around.
        task_prompts: The task's prompts, among which those of a dump are looked for where their special tokens are gone.
        vocabulary: Rows of the policy's embedding; tokens from it on are refused.

    Raises:
        UserError: Rows that cannot be what the policy saw or drew, all by number.
    """
    found, mistakes = TokenizedRows(), Mistakes(table.path, table.rows[0].place.split()[0])
    prompts = _Prompts(tokenizer, sampling_config.rendering, system_prompt, task_prompts)
    counts = _Counts()
    for number, row in enumerate(table.rows, start=1):
        try:
            prompt = prompts.ids_of(row)
            completion, drawn = _completion(row, tokenizer, sampling_config, counts)
            _check(row, prompt, completion, sampling_config, vocabulary)
        except ValueError as error:
            mistakes.add(_place_number(row.place, number), error)
            continue
        found.prompt_ids.append(prompt)
        found.completion_ids.append(completion)
        found.drawn.append(None if drawn is None or all(drawn) else drawn)
        found.prompts.append(prompts.shown(row, prompt))
    mistakes.refuse()
    begins = (*sampling_config.eos_token_ids, getattr(tokenizer, "bos_token_id", None))
    _refuse_padding(table, found, sampling_config.pad_token_id, begins)
    found.notes = [*table.notes, *counts.notes(len(table), sampling_config, table.format)]
    return found


def _refuse_padding(table: RolloutTable, found: TokenizedRows, pad: int, begins: Sequence[int | None]) -> None:
    """Raises UserError for rows cut out of padded batches, and for completions that begin with their prompt.

    begins: tokens with which a prompt may begin, the padding token among them or not.
    """
    given = [i for i, row in enumerate(table.rows) if row.completion_ids is not None]
    prompts, completions = ([of[i] for i in given] for of in (found.prompt_ids, found.completion_ids))
    left = sum(p[0] == pad and (pad not in begins or p[:2] == [pad, pad]) for p in prompts)
    if left:
        raise UserError(
            f"{table.path}: prompt_ids of {left} rows begin with the padding token {pad}, which the policy would be given as "
            "text: leave padding out"
        )
    one_width = len({len(c) for c in completions}) == 1
    padded = sum(found.drawn[i] is None and c[-2:] == [pad, pad] for i, c in zip(given, completions, strict=True))
    if len(given) > 1 and one_width and padded:
        raise UserError(
            f"{table.path}: completion_ids of {padded} rows end in the padding token {pad}, and all are {len(completions[0])} "
            "long, as in a padded batch: leave padding out, or mark it in completion_mask"
        )
    inside = [c[: len(p)] == p for p, c in zip(prompts, completions, strict=True)]
    if given and all(inside) and sum(map(len, prompts)) >= _LONG_ENOUGH:
        raise UserError(
            f"{table.path}: completion_ids begin with prompt_ids in every row: leave the prompt out of them"
        )


def _place_number(place: str, otherwise: int) -> int:
    digits = place.split(",")[0].split()[-1]
    return int(digits) if digits.isdigit() else otherwise


def _check(
    row: RolloutRow, prompt: list[int], completion: list[int], sampling_config: SamplingConfig, vocabulary: int | None
) -> None:
    largest = max(max(prompt), max(completion))
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"holds the token {largest}, and the policy has {vocabulary}: it is of another model's tokenizer"
        )
    if not prompt:
        raise ValueError("its prompt has no token: nothing predicts the first one of the completion")
    drawn = len(completion) if row.completion_mask is None else sum(row.completion_mask)
    if drawn > sampling_config.max_completion_length:
        raise ValueError(
            f"the policy drew {drawn} tokens, and completions have at most {sampling_config.max_completion_length}: set "
            "entropy_analysis.sampling.max_completion_length to the run's"
        )
    if row.temperature is not None and abs(row.temperature - sampling_config.temperature) > 1e-6:
        raise ValueError(
            f"was drawn at temperature {row.temperature:g}, and the analysis is at {sampling_config.temperature:g}: set "
            "entropy_analysis.sampling.temperature"
        )


@dataclass
class _Counts:
    texts: int = 0
    closed: int = 0
    cut: int = 0
    unclosed: int = 0
    goes_on: int = 0
    changed: int = 0

    def notes(self, rows: int, sampling_config: SamplingConfig, source: str) -> list[str]:
        found = []
        if self.texts:
            found.append(
                f"{self.texts} of {rows} sequences are texts without token ids: tokenised anew, which can differ from what was "
                "drawn in how words are split, in special tokens and in the chat template's arguments; save token ids to be sure"
            )
            if self.closed or self.cut:
                found.append(
                    f"{source} does not say how texts ended: an end-of-sequence token was added to {self.closed}, and "
                    f"{self.cut} that reach the maximum of {sampling_config.max_completion_length} tokens were taken for cut"
                )
            if self.changed:
                found.append(
                    f"{self.changed} texts are not the same after tokenising and decoding: parts of them are lost"
                )
        if self.unclosed:
            found.append(f"{self.unclosed} of {rows} sequences were cut: they have no end-of-sequence token")
        if self.goes_on:
            found.append(
                f"{self.goes_on} sequences go on after an end-of-sequence token of this checkpoint "
                f"({', '.join(map(str, sampling_config.eos_token_ids))}): the sampler stopped at others than an analysis would"
            )
        return found


def _completion(
    row: RolloutRow, tokenizer: Any, sampling_config: SamplingConfig, counts: _Counts
) -> tuple[list[int], list[bool] | None]:
    ends = sampling_config.eos_token_ids
    if row.completion_ids is not None:
        drawn = row.completion_mask
        own = [t for k, t in enumerate(row.completion_ids) if drawn is None or drawn[k]]
        # A drawn token right after a drawn end: the generator stopped elsewhere, or the row was padded.
        after = next((k for k, t in enumerate(own[:-1]) if t in ends), None) if drawn is None else None
        if after is not None:
            rest = own[after + 1 :]
            if all(t in ends or t == sampling_config.pad_token_id for t in rest):
                raise ValueError(
                    f"completion_ids goes on with {len(rest)} padding tokens after its end-of-sequence token: leave them out"
                )
            counts.goes_on += 1
        counts.unclosed += own[-1] not in ends
        return row.completion_ids, drawn
    assert row.completion is not None
    counts.texts += 1
    plain = text_tokens(tokenizer, row.completion)
    counts.changed += tokenizer.decode(plain, skip_special_tokens=False) != row.completion
    if row.truncated:
        counts.unclosed += 1
        if not plain:
            raise ValueError("its completion is empty and was cut: the policy drew nothing; leave the row out")
        return plain[: sampling_config.max_completion_length], None
    ids = as_sampled(tokenizer, row.completion, sampling_config)
    if row.truncated is None:
        counts.closed += ids[-1] in ends and (not plain or plain[-1] not in ends)
        counts.cut += ids[-1] not in ends
    return ids, None


class _Prompts:
    """Prompts as token ids, each text tokenised once."""

    def __init__(
        self, tokenizer: Any, rendering: PromptRendering, system_prompt: str | None, task_prompts: Iterable[Any]
    ):
        self.tokenizer, self.rendering, self.system_prompt = tokenizer, rendering, system_prompt
        self.task_prompts = list(task_prompts)
        self._known: dict[tuple[str, str], list[int]] = {}
        self._of_task: dict[str, list[list[int]]] | None = None

    def ids_of(self, row: RolloutRow) -> list[int]:
        """Raises ValueError where a prompt's special tokens cannot be had again."""
        if row.prompt_ids is not None:
            return row.prompt_ids
        key = (row.prompt_form, str(row.prompt))
        if key not in self._known:
            self._known[key] = self._tokenized(row)
        return self._known[key]

    def shown(self, row: RolloutRow, ids: list[int]) -> Any:
        """What a reader sees: the messages or the text, decoded where there is none."""
        if row.prompt is None:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self._chat(row.prompt) if row.prompt_form == "chat" else row.prompt

    def _chat(self, prompt: Any) -> list[dict[str, str]]:
        if not isinstance(prompt, str):
            return prompt
        user = [{"role": "user", "content": prompt}]
        return [{"role": "system", "content": self.system_prompt}, *user] if self.system_prompt else user

    def _tokenized(self, row: RolloutRow) -> list[int]:
        if row.prompt_form == "chat":
            return self._rendered(self._chat(row.prompt))
        if row.prompt_form == "plain":
            return tokenize_prompts(self.tokenizer, [row.prompt], self.rendering)[0]
        if row.prompt_form == "templated":
            return text_tokens(self.tokenizer, row.prompt)
        return self._with_special_tokens(row.prompt)

    def _rendered(self, messages: Any) -> list[int]:
        return tokenize_prompts(self.tokenizer, [messages], self.rendering)[0]

    def _plain(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _with_special_tokens(self, text: str) -> list[int]:
        """The one rendering whose text without special tokens is `text`: of the task's prompts, else of a user's message."""
        if self._of_task is None:
            self._of_task = {}
            for ids in tokenize_prompts(self.tokenizer, self.task_prompts, self.rendering) if self.task_prompts else ():
                self._of_task.setdefault(self._plain(ids), []).append(ids)
        candidates = self._of_task.get(text) or [ids for ids in self._inverted(text) if self._plain(ids) == text]
        distinct = {tuple(ids) for ids in candidates}
        if len(distinct) == 1:
            return list(distinct.pop())
        why = "can have been several" if distinct else "cannot be had again"
        raise ValueError(
            f"the special tokens of its prompt, which the dump leaves out, {why}: give the run's prompts as checkpoint.task, or "
            "save token ids"
        )

    def _inverted(self, text: str) -> list[list[int]]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            return [tokenize_prompts(self.tokenizer, [text], self.rendering)[0]]
        system, user = _SENTINELS
        found = []
        alone = self._plain(self._rendered([{"role": "user", "content": user}])).split(user)
        if len(alone) == 2 and text.startswith(alone[0]) and text.endswith(alone[1]):
            middle = text[len(alone[0]) : len(text) - len(alone[1])]
            if len(alone[0]) + len(alone[1]) <= len(text):
                found.append(self._rendered([{"role": "user", "content": middle}]))
        try:
            both = self._plain(
                self._rendered([{"role": "system", "content": system}, {"role": "user", "content": user}])
            )
        except UserError:  # a template without system messages
            return found
        before, _, rest = both.partition(system)
        between, _, after = rest.partition(user)
        if between and text.startswith(before) and text.endswith(after):
            inner = text[len(before) : len(text) - len(after)] if after else text[len(before) :]
            parts = inner.split(between)
            for k in range(1, len(parts)):
                said, asked = between.join(parts[:k]), between.join(parts[k:])
                found.append(self._rendered([{"role": "system", "content": said}, {"role": "user", "content": asked}]))
        return found
