"""The task that every implementation gets: a LoRA policy, two batches of ragged sequences, a preconditioner.

    K(t, i) = dS_t^T diag(P) dS_i,     S = sum over completion tokens of log pi(token | all before it)

tiny     a random Llama (width 256, 6 layers, LoRA r = 16 on all linear layers), random tokens, vocabulary of 32,000 or 512,
         tied embeddings; P from AdamW's moments after four steps on other random tokens
smollm2  SmolLM2-135M with a trained LoRA adapter (r = 16), the first checkpoint of a run with its Adam's moments, and sequences
         that the run sampled, from its first step on (later, as entropy falls, completions repeat each other word by word).
         Evaluation: one completion of each of n prompts; training: groups of 8 completions of other prompts
smollm2-apart  the same, with a prompt of its own for every sequence of both sides: only the chat template is shared
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.adamw import adam_preconditioner
from entropy_core.batch import SequenceBatch, length_buckets

# Padded tokens of a batch, for everyone. On a CPU of two cores 1,024 are faster than 4,096, for all libraries and the plain pass.
TOKEN_BATCH_SIZES = {"cpu": 1024, "cuda": 4096}
VOCABULARIES = {"tiny-32k": 32_000, "tiny-512": 512}
SIZES = {
    "tiny-32k": ((16, 32), (32, 64), (64, 128)),
    "tiny-512": ((16, 32), (32, 64), (64, 128)),
    "smollm2": ((32, 64),),
    "smollm2-apart": ((16, 32),),
}
GROUP_SIZES = {"smollm2": 8, "smollm2-apart": 1}  # completions of a prompt on the training side


@dataclass(frozen=True)
class Part:
    """A padded batch as libraries take it. indices: (n,) into the side; input_ids: (n, L), right-padded; mask: (n, L),
    true on completion tokens; positions: (p,) ascending, at least all positions that predict a completion token of the part.
    """

    indices: Tensor
    input_ids: Tensor
    mask: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Case:
    """rows stand for the evaluation side, columns for the training side. preconditioner: name -> P, trainable parameters."""

    model: nn.Module
    rows: SequenceBatch
    columns: SequenceBatch
    preconditioner: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def smallest(self) -> Case:
        """Two rows and two columns of it: what implementations warm up on."""
        return Case(self.model, self.rows.select([0, 1]), self.columns.select([0, 1]), self.preconditioner)


def parts(batch: SequenceBatch, token_batch_size: int | None = None) -> list[Part]:
    """Length-sorted batches of at most `token_batch_size` padded tokens (default: TOKEN_BATCH_SIZES); the same for everybody."""
    found = []
    for bucket in length_buckets(batch, token_batch_size or TOKEN_BATCH_SIZES[batch.device.type]):
        ids = torch.nn.functional.pad(bucket.input_ids, (0, 1))  # the last token too, as libraries' users pass it
        ids[bucket.rows, bucket.positions + 1] = bucket.targets
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=batch.device)
        mask[bucket.rows, bucket.positions + 1] = True
        positions = torch.arange(int(bucket.positions.min()), int(bucket.positions.max()) + 1, device=batch.device)
        found.append(Part(bucket.indices, ids, mask, positions))
    return found


def whole(batch: SequenceBatch) -> Part:
    """All sequences in one padded batch."""
    return parts(batch, batch.input_ids.numel() * 2)[0]


def build_case(name: str, n_rows: int, n_columns: int, device: str, run: Path | None, attention: str) -> Case:
    """The same numbers on every call."""
    if name in VOCABULARIES:
        return _tiny(VOCABULARIES[name], n_rows, n_columns, device, attention)
    if name in GROUP_SIZES:
        return _smollm2(n_rows, n_columns, GROUP_SIZES[name], device, run, attention)
    raise SystemExit(f"unknown case {name!r}: choose from {', '.join(SIZES)}")


def random_batch(
    n: int, vocabulary: int, seed: int, prompt: tuple[int, int], completion: tuple[int, int]
) -> SequenceBatch:
    """n sequences of random tokens; prompts and completions of lengths drawn evenly between the bounds (inclusive)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    prompts, completions = [draw(*prompt) for _ in range(n)], [draw(*completion) for _ in range(n)]
    return SequenceBatch.from_sequences(prompts, completions, list(range(n)), pad_token_id=0)


def random_adapters(model: nn.Module, r: int, seed: int) -> nn.Module:
    """LoRA on all linear layers, both factors random (B = 0, peft's start, would leave the rows of A without gradient)."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", lora_dropout=0.0))
    generator = torch.Generator().manual_seed(seed)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5 / 4)
    return adapted.eval()


def _tiny(vocabulary: int, n_rows: int, n_columns: int, device: str, attention: str) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    model = random_adapters(LlamaForCausalLM(config), r=16, seed=1).to(device)
    lengths = {"prompt": (16, 40), "completion": (8, 32)}
    p = _moments_of_four_steps(model, random_batch(32, vocabulary, 2, **lengths).to(device))
    rows, columns = (
        random_batch(n, vocabulary, seed, **lengths).to(device) for n, seed in ((n_rows, 3), (n_columns, 4))
    )
    return Case(model, rows, columns, p)


def _moments_of_four_steps(model: nn.Module, batch: SequenceBatch) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)
    for step in range(4):
        score(model, whole(batch.select(list(range(8 * step, 8 * step + 8))))).sum().div(8).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in adam_preconditioner(optimizer, model.named_parameters()).items()}


def _smollm2(n_rows: int, n_columns: int, group_size: int, device: str, run: Path | None, attention: str) -> Case:
    from entropy_experiments.checkpoint_loader import load_checkpoint

    assert run is not None
    first = min(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=run)
    checkpoint = load_checkpoint(first, device=device)
    if checkpoint.optimizer is None:
        raise SystemExit(f"{first} holds no optimizer state to take P from: name another run with --run")
    model = checkpoint.model
    model.get_base_model().set_attn_implementation(attention)
    p = {
        name: value.detach()
        for name, value in adam_preconditioner(checkpoint.optimizer, model.named_parameters()).items()
    }
    rows, columns = recorded_sequences(run, n_rows, n_columns, group_size)
    return Case(model, rows.to(device), columns.to(device), p)


def recorded_sequences(run: Path, n_rows: int, n_columns: int, group_size: int) -> tuple[SequenceBatch, SequenceBatch]:
    """Sequences that the run sampled, no two the same: columns in groups of `group_size` completions of a prompt, then rows
    that are one completion of each of other prompts.
    """
    import pyarrow.parquet as pq

    completions: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for file in sorted((run / "rollouts").glob("step-*.parquet")):
        recorded: dict[str, list[Any]] = pq.read_table(file, columns=["prompt_ids", "completion_ids"]).to_pydict()
        for prompt, completion in zip(recorded["prompt_ids"], recorded["completion_ids"], strict=True):
            known = completions.setdefault(tuple(prompt), [])
            if completion and tuple(completion) not in known:
                known.append(tuple(completion))
    groups = [(prompt, found[:group_size]) for prompt, found in completions.items() if len(found) >= group_size]
    groups = groups[: -(-n_columns // group_size)]
    taken = {prompt for prompt, _ in groups}
    singles = [(prompt, found[:1]) for prompt, found in completions.items() if prompt not in taken and found][:n_rows]
    sides = [[(p, c) for p, found in side for c in found] for side in (singles, groups)]
    if len(sides[0]) < n_rows or len(sides[1]) < n_columns:
        raise SystemExit(
            f"{run} recorded {len(sides[0])} prompts for the evaluation side and {len(sides[1])} sequences in groups of "
            f"{group_size} for the training side, {n_rows} and {n_columns} are needed: name a longer run with --run, or "
            "smaller --sizes"
        )
    rows, columns = (
        SequenceBatch.from_sequences([list(p) for p, _ in side], [list(c) for _, c in side], list(range(len(side))), 0)
        for side in (sides[0], sides[1][:n_columns])
    )
    return rows, columns


def score(model: nn.Module, part: Part, cut: bool = False) -> Tensor:
    """(n,) S of each sequence of the part, differentiable; logits at all positions or, `cut`, from the first that is needed.

    The loss of a library's user: no more than transformers' own arguments.
    """
    positions = part.positions if cut else torch.arange(part.input_ids.shape[1] - 1, device=part.input_ids.device)
    keep = {"logits_to_keep": positions} if cut else {}
    logits = model(input_ids=part.input_ids, use_cache=False, **keep).logits
    logits = logits if cut else logits[:, :-1]
    targets = part.input_ids[:, positions + 1]
    logprobs = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    return (logprobs * part.mask[:, positions + 1]).sum(1)


def relative_error(kernel: Tensor, expected: dict[str, Tensor], which: str) -> float:
    """||K - reference|| / ||reference||, Frobenius, over the entries that the reference has."""
    found = kernel.detach().double().cpu()[expected["rows"]][:, expected["columns"]]
    return float((found - expected[which]).norm() / expected[which].norm())
