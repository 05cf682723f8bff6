"""The policy after any number of steps of a run, and what it thinks of every token of recorded
sequences.

The forward passes here are the plain ones of a trainer (model(input_ids, attention_mask)), not
those of entropy_core: an audit that shared code with what it checks would share its mistakes.
Positions of padding and of foreign tokens get values as well, because a log may have counted them.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from entropy_experiments.audit.recorded_run import RecordedRun, Sequence
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.checkpoints.half_precision import HALF
from entropy_experiments.checkpoints.validation import examine_checkpoint
from rl_training.errors import UserError
from rl_training.run.sidecar import read_sidecar

# Logits of one forward pass: bounds memory (float32: 256 MiB), changes no number.
_LOGIT_ELEMENTS = 2**26
# Models that are kept for another look, together.
_MODEL_BYTES = 2**30


@dataclass(frozen=True)
class TokenValues:
    """Of one sequence, by place in [prompt, completion, padding, one more]: place j holds what is
    predicted of token j from those before it; place 0, which nothing predicts, is 0.

    Nats, float64.
    """

    entropy: np.ndarray
    logprob: np.ndarray
    """Of the token that stands there; 0 at the last place."""
    variance: np.ndarray
    """Of the log-probability under the policy, nats²."""


Key = tuple[tuple[int, ...], tuple[int, ...], int]


class Policies:
    """Loads policies by the number of steps they have taken, one at a time, and remembers what they
    said.

    precision: "run" as the trainer computed, "float32", or "bf16" (autocast).
    """

    def __init__(self, run: RecordedRun, device: str) -> None:
        self.run, self._device = run, device
        self._loaded: OrderedDict[int, nn.Module] = OrderedDict()
        self._values: dict[tuple[int, str, float], dict[Key, TokenValues]] = {}
        self._why_not: dict[int, str | None] = {}
        self.notes: list[str] = []

    def why_not(self, steps: int) -> str | None:
        """Why there is no policy after `steps` steps; None where there seems to be one."""
        if steps in self._why_not:
            return self._why_not[steps]
        if steps in self.run.checkpoints:
            return None
        if steps == 0:
            if 0 not in self._why_not:
                self._why_not[0] = self._why_no_beginning()
            return self._why_not[0]
        return f"no checkpoint-{steps}"

    @property
    def precision(self) -> str:
        """What the run's forward passes were computed in."""
        mixed = self.run.settings.mixed_precision
        return (
            mixed if mixed in HALF else {"bfloat16": "bf16", "float16": "fp16"}.get(self.run.settings.dtype, "float32")
        )

    def values(self, steps: int, precision: str, temperature: float, rows: Rows[Sequence]) -> list[TokenValues]:
        """Of `rows` under the policy after `steps` steps.

        Raises:
            UserError: that policy cannot be had.
        """
        known = self._values.setdefault((steps, precision, temperature), {})
        missing = {k: r for r in rows if (k := _key(r)) not in known}
        if missing:
            model = self._model(steps)
            # The other temperatures of an audit come from the same logits.
            temperatures = {temperature, 1.0, self.run.settings.temperature}
            with self._in_precision(model, precision):
                found = _pass(model, list(missing.values()), sorted(temperatures), self.run.settings.pad_token_id)
            for t, values in found.items():
                self._values.setdefault((steps, precision, t), {}).update(zip(missing, values, strict=True))
        return [known[_key(r)] for r in rows]

    # ------------------------------------------------------------------ loading
    def _model(self, steps: int) -> nn.Module:
        if steps not in self._loaded:
            if (why := self.why_not(steps)) is not None:
                raise UserError(why)
            self._make_room()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                model = self._load(steps)
            for line in (str(w.message) for w in said if issubclass(w.category, UserWarning)):
                if "not verified" in line:  # of each checkpoint alike
                    self._note("not verified of the checkpoints: " + line.partition("not verified: ")[2])
            self._loaded[steps] = model
        self._loaded.move_to_end(steps)
        return self._loaded[steps]

    def _make_room(self) -> None:
        """Before another model needs the memory: of small models several are kept, of large ones
        none.
        """
        sizes = {steps: sum(p.numel() * p.element_size() for p in m.parameters()) for steps, m in self._loaded.items()}
        while self._loaded and sum(sizes[steps] for steps in self._loaded) + max(sizes.values()) > _MODEL_BYTES:
            self._loaded.popitem(last=False)

    def _load(self, steps: int) -> nn.Module:
        if steps in self.run.checkpoints:
            return self._checkpoint(steps)
        first = min(self.run.checkpoints)
        if _has_adapter(self.run.checkpoints[first]):
            model = self._checkpoint(first)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.zero_()
            return model
        from rl_training.models.load import load_model_and_tokenizer

        name = self._base_name(first)
        self._note(f"the policy before step 1 is taken to be {name} as it is today")
        return load_model_and_tokenizer(name, self.run.settings.dtype, self._device)[0]

    def _checkpoint(self, steps: int) -> nn.Module:
        folder = self.run.checkpoints[steps]
        dtype = None if read_sidecar(folder) is not None else self.run.settings.dtype
        name = None
        if read_sidecar(folder) is None and _has_adapter(folder) and self.run.settings.model_name:
            name = self.run.settings.model_name
        return load_checkpoint(folder, name, self._device, dtype, require_optimizer=False).model

    def _base_name(self, first: int) -> str:
        sidecar = read_sidecar(self.run.checkpoints[first])
        return self.run.settings.model_name if sidecar is None else sidecar.model_name

    def _why_no_beginning(self) -> str | None:
        """Whether the policy before the first step can be had from its base model."""
        first = min(self.run.checkpoints)
        folder = self.run.checkpoints[first]
        if _has_adapter(folder):
            return _why_not_begun_at_base(folder)
        return None if self._base_name(first) else "the base model has no name to load it by"

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    @contextlib.contextmanager
    def _in_precision(self, model: nn.Module, precision: str) -> Any:
        mixed = self.run.settings.mixed_precision
        wanted = (mixed if mixed in HALF else None) if precision == "run" else precision if precision in HALF else None
        device = next(model.parameters()).device.type
        if precision == "float32" and self.run.settings.dtype in ("bfloat16", "float16"):
            self._loaded.clear()  # what is cast is another policy from here on
            model.float()
        with torch.autocast(device, HALF[wanted]) if wanted else contextlib.nullcontext():
            yield


def _key(row: Sequence) -> Key:
    return row.prompt_ids, row.completion_ids, max(row.width, len(row.completion_ids))


@lru_cache(maxsize=64)
def _has_adapter(folder: Path) -> bool:
    return examine_checkpoint(folder, with_optimizer=False).adapter is not None


def _why_not_begun_at_base(folder: Path) -> str | None:
    """LoRA begins at the base model, with its second factor at zero; other beginnings are not known
    from a checkpoint.
    """
    adapter = examine_checkpoint(folder, with_optimizer=False).adapter
    assert adapter is not None
    config = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    begins_at_zero = config.get("init_lora_weights", True) in (True, "gaussian", "orthogonal")
    plain = config.get("peft_type") == "LORA" and not config.get("use_dora") and config.get("bias", "none") == "none"
    alone = not config.get("modules_to_save") and not config.get("trainable_token_indices")
    if plain and begins_at_zero and alone and config.get("init_lora_weights", True) != "orthogonal":
        return None
    return "what its adapter was before the first step is not in any checkpoint"


@torch.no_grad()
def _pass(
    model: nn.Module, rows: list[Sequence], temperatures: list[float], pad_token_id: int
) -> dict[float, list[TokenValues]]:
    """One forward pass over all rows, right-padded in batches of similar length."""
    out: dict[float, list[TokenValues | None]] = {t: [None] * len(rows) for t in temperatures}
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if not all(
        0 <= token < vocabulary for row in rows for token in (*row.prompt_ids, *row.completion_ids, pad_token_id)
    ):
        raise UserError(
            f"recorded tokens are not of the policy's vocabulary of {vocabulary}: they are damaged, or another run's"
        )
    order = sorted(range(len(rows)), key=lambda n: _places(rows[n]))
    while order:
        longest = _places(rows[order[-1]])
        count = max(1, min(len(order), _LOGIT_ELEMENTS // (longest * vocabulary)))
        taken, order = order[-count:], order[:-count]
        ids = torch.full((len(taken), longest), pad_token_id, dtype=torch.long)
        attended = torch.zeros_like(ids)
        for n, row in enumerate(taken):
            tokens = [*rows[row].prompt_ids, *rows[row].completion_ids]
            ids[n, : len(tokens)] = torch.tensor(tokens)
            attended[n, : len(tokens)] = 1
        logits = model(input_ids=ids.to(device), attention_mask=attended.to(device)).logits
        for t in temperatures:
            for n, row in enumerate(taken):
                out[t][row] = _of_logits(logits[n], ids[n], t, _places(rows[row]))
    return {t: [v for v in values if v is not None] for t, values in out.items()}


def _places(row: Sequence) -> int:
    """Tokens of a row with its padding, and one more."""
    return len(row.prompt_ids) + max(row.width, len(row.completion_ids)) + 1


def _of_logits(logits: torch.Tensor, ids: torch.Tensor, temperature: float, places: int) -> TokenValues:
    """Token values of one row's logits.

    Args:
        logits: (l, V) of one row.
        ids: (l,).
    """
    full = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(full[: places - 1] / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)  # a token that is ruled out adds nothing
    variance = (logprobs.exp() * (logprobs.clamp(min=-1e4) + entropy[:, None]) ** 2).sum(-1)
    chosen = logprobs.gather(1, ids[1:places, None].to(logprobs.device))[:, 0]
    values = torch.zeros(3, places, dtype=torch.float64)
    values[0, 1:], values[1, 1:], values[2, 1:] = entropy, chosen, variance
    values[1, -1] = 0.0
    return TokenValues(*values.numpy())
