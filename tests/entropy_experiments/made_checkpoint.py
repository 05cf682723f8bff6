"""A checkpoint of any model and adapter, made by a few real AdamW steps on sampled completions: no trainer is asked.

Moments must resemble gradients (the analysis looks), so steps are policy-gradient steps on the policy's own draws. The record
beside it is that of a checkpoint of the tiny run but for what differs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.tiny_policy import character_tokenizer

STEPS, TOKENS = 4, 8
SIDECAR = "entropy_experiments.json"


def make_checkpoint(
    base: nn.Module, adapt: Callable[[nn.Module], nn.Module] | None, folder: Path, template: Path, factor: float = 5.0
) -> Path:
    """`folder`/run/checkpoint-4. adapt: puts an adapter onto `base`, whose weights stay; None: fully trained. template: a
    checkpoint of the tiny run. factor: on matrices of the base, so that its distributions are far from uniform.
    """
    path, policy, tokenizer = folder / "run" / f"checkpoint-{STEPS}", folder / "policy", character_tokenizer()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in base.parameters():
            if p.dim() > 1:
                p.mul_(factor)
    base.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    model = base if adapt is None else adapt(base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if adapt is not None:
        with torch.no_grad():  # away from an adapter's zeros
            for p in trained.values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    for _ in range(STEPS):
        _policy_gradient_step(model, optimizer, generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": []}))
    record = json.loads((template / SIDECAR).read_text())
    record |= {
        "step": STEPS, "model_name": str(policy if adapt is not None else path), "learning_rates_used": [1e-3],
        "optimizer_parameter_names": [list(trained)], "witness": None, "sha256": {},
    }  # fmt: skip
    (path / SIDECAR).write_text(json.dumps(record))
    return path


def _policy_gradient_step(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    prompts = torch.randint(3, 13, (16, 3), generator=generator)
    ids, model = prompts, model.eval()
    with torch.no_grad():
        for _ in range(TOKENS):
            sampling_config = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(sampling_config, 1, generator=generator)], 1)
    weights = torch.randn(len(ids), generator=generator)
    scores = _logprobs(model, ids)[:, prompts.shape[1] - 1 :].sum(1)
    optimizer.zero_grad()
    (-(weights - weights.mean()) @ scores / (len(ids) * TOKENS)).backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def _logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
