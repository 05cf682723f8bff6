"""A policy that learns sums of three numbers in two minutes on one core: a Llama of three layers over 22 characters.

It is trained by cross-entropy on answers in several styles, many of them wrong, so that it starts undecided (about 0.6 nats a
token) and often wrong; reinforcement learning then has something to improve and an entropy to lose.

    13+8-2|  ->  "19."                     the answer alone
                 "13+8=21,21-2=19."        step by step; which separator stands between is left open
                 "21;-2:19."               the same in another notation

With more terms (`terms_each`) answers go step by step, each step in one of two notations, and are several times as long.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import Split
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-=,;:. "
STYLES = (0.3, 0.4, 0.3)
WRONG = 0.2  # of the results shown: a policy that is never wrong gives no gradient
LARGEST = 19
PLAIN = 0.5  # of the steps of a long sum that are written out in full
WIDTH, LAYERS, BATCH, STEPS, RATE = 64, 3, 96, 1800, 3e-3


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "|": 3}
    vocabulary |= {character: 4 + i for i, character in enumerate(CHARACTERS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([Split("", "isolated")])
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}|"
    return fast


def problem(rng: Random, count: int = 3) -> tuple[str, list[int]]:
    """The text of a sum of `count` terms, and the signed terms."""
    terms = [rng.randint(0, LARGEST)] + [rng.choice((-1, 1)) * rng.randint(0, LARGEST) for _ in range(count - 1)]
    return str(terms[0]) + "".join(_signed(t) for t in terms[1:]), terms


def _signed(term: int) -> str:
    return f"{'-' if term < 0 else '+'}{abs(term)}"


def shown_answer(terms: list[int], rng: Random) -> str:
    """An answer in one of the styles, its results wrong now and then; sums of more than three terms step by step."""
    if len(terms) > 3:
        return _chain(terms, rng)
    first, second, third = terms
    middle, total = _slip(first + second, rng), _slip(sum(terms), rng)
    style, between = rng.choices(range(3), STYLES)[0], rng.choice(",;: ")
    signed = _signed(third)
    if style == 0:
        return f"{total}."
    if style == 1:
        return f"{first}{_signed(second)}={middle}{between}{middle}{signed}={total}."
    return f"{middle}{between}{signed}{rng.choice('=:')}{total}."


def _chain(terms: list[int], rng: Random) -> str:
    """Every partial sum in turn, each from the one shown before it: what slips once is wrong to the end."""
    shown, text = terms[0], ""
    for position, term in enumerate(terms[1:], 1):
        result = _slip(shown + term, rng)
        text += f"{shown}{_signed(term)}={result}" if rng.random() < PLAIN else f"{_signed(term)}:{result}"
        text += "." if position == len(terms) - 1 else rng.choice(",;: ")
        shown = result
    return text


def _slip(result: int, rng: Random) -> int:
    return result + rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < WRONG else result


def write_problems(path: Path, terms_each: int = 3, count: int = 4000, seed: int = 0) -> None:
    """Distinct problems as lines {"prompt", "answer"}."""
    rng, seen, lines = Random(seed), set(), []
    while len(lines) < count:
        text, terms = problem(rng, terms_each)
        if text not in seen:
            seen.add(text)
            lines.append(json.dumps({"prompt": text, "answer": str(sum(terms))}))
    path.write_text("\n".join(lines) + "\n")


def make_policy(folder: Path, terms_each: int = 3, seed: int = 0) -> Path:
    """Train the policy and save it with its tokenizer and `problems.jsonl`; a folder that is complete is left as it is."""
    if (folder / "problems.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    coder, rng = tokenizer(), Random(seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(coder),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        ids, labels = _batch(coder, rng, terms_each)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            print(f"supervised step {step}: {float(loss):.3f} nats a token", flush=True)
    model.save_pretrained(folder)
    coder.save_pretrained(folder)
    write_problems(folder / "problems.jsonl", terms_each)  # last: it says that the folder is complete
    return folder


def _batch(coder: PreTrainedTokenizerFast, rng: Random, terms_each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels of a batch; prompts are not predicted."""
    rows = []
    for _ in range(BATCH):
        text, terms = problem(rng, terms_each)
        prompt, answer = coder.encode(text + "|"), [*coder.encode(shown_answer(terms, rng)), 1]
        rows.append((prompt, answer))
    width = max(len(p) + len(a) for p, a in rows)
    ids, labels = torch.zeros(BATCH, width, dtype=torch.long), torch.full((BATCH, width), -100)
    for n, (prompt, answer) in enumerate(rows):
        ids[n, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[n, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels
