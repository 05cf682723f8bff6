"""One forward pass of a causal language model with logits at completion positions only.

A model of vocabulary V and width d spends V·d multiplications a position on logits. Prompts need none, so the input of the
output layer is cut to the positions that predict completion tokens, before the layer runs: everything the model does to
its logits afterwards (scaling, soft-capping) still happens, on an (m, V) tensor instead of (n, l, V).
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from entropy_core.batch import Bucket


def innermost_model(model: nn.Module) -> nn.Module:
    """The language model inside data-parallel and adapter wrappers (which pass their arguments on to it)."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = cast(nn.Module, model.module)
        elif callable(inner := getattr(model, "get_base_model", None)):
            model = cast(nn.Module, inner())
        else:
            return model


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, or None where the model does not name one."""
    get = getattr(innermost_model(model), "get_output_embeddings", None)
    return cast("nn.Module | None", get()) if callable(get) else None


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its tokens, and where results over several parameters are added up: its first parameter's device.

    A model that is cut over several devices hands its hidden states on by itself. Parameters that lie on no device between
    calls ("meta": offloaded) are passed over.
    """
    devices = (p.device for p in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and gradient checkpointing idle inside; every module's training flag is restored afterwards.

    Dropout would make every log-probability a random number, and the gradient that of another function. What modules keep of
    one evaluation pass for the next is not used either: weights move in between (peft's DoRA keeps norms, where it is told to).
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    with checkpointing_off(model), _nothing_kept():
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def checkpointing_off(model: nn.Module) -> Iterator[None]:
    """No layer is marked for gradient checkpointing inside. peft (aLoRA) leaves hooks on layers that are, until a backward pass
    that may never come, and the next forward pass ends in an error.
    """
    marked = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in marked:
        vars(module)["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for module in marked:
            vars(module)["gradient_checkpointing"] = True


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """peft's DoRA computes its norms anew in every pass inside."""
    dora = sys.modules.get("peft.tuners.lora.dora")  # a model has its modules only where it is loaded
    if not getattr(dora, "ENABLE_DORA_CACHING", False):
        yield
        return
    vars(dora)["ENABLE_DORA_CACHING"] = False
    try:
        yield
    finally:
        vars(dora)["ENABLE_DORA_CACHING"] = True


@contextmanager
def true_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, gradients of parameters are the derivatives of what the model computes: by no rule of embeddings
    (`true_embedding_gradients`), and past hooks of parameters (`without_gradient_hooks`) and modules that change gradients on
    their way to an optimizer.
    """
    names = ("_backward_hooks", "_backward_pre_hooks")
    hooked = [(m, {n: vars(m)[n] for n in names}) for m in model.modules() if any(vars(m).get(n) for n in names)]
    for module, _ in hooked:
        vars(module).update({name: OrderedDict() for name in names})
    try:
        with true_embedding_gradients(model), without_gradient_hooks(model.parameters()):
            yield
    finally:
        for module, hooks in hooked:
            vars(module).update(hooks)


@contextmanager
def without_gradient_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, hooks that somebody has put on parameters do not change their gradients (torch.autograd.grad's either); they are
    put back afterwards. Such hooks mask, scale or project the gradients that training steps with (peft's OSF does).
    """
    taken = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for p, _ in taken:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in taken:
            p._backward_hooks = hooks


@contextmanager
def true_embedding_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, gradients of embeddings are the derivatives of what the model computes.

    `nn.Embedding(padding_idx=...)` gives the padding token's row none, although a policy reads it wherever the token is drawn,
    or where it doubles as another special token; `scale_grad_by_freq` divides rows by how often a batch holds their token.
    Training goes by torch's rules, so the step's own gradient keeps to them (`as_trained`); how scores and entropy change
    when a row moves (through tied output weights, say) does not. Source: docs/theory/fisher-kernel.md, "Padding tokens".

    Raises ValueError for an embedding with max_norm, which rescales its own weights in every pass.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if any(m.max_norm is not None for m in embeddings):
        raise ValueError(
            "an embedding with max_norm rescales its weights in every pass, so the policy is not a function of its parameters: "
            "set max_norm=None"
        )
    kept = [(m, m.padding_idx, m.scale_grad_by_freq) for m in embeddings]
    for module in embeddings:
        module.padding_idx, module.scale_grad_by_freq = None, False
    try:
        yield
    finally:
        for module, index, scaled in kept:
            module.padding_idx, module.scale_grad_by_freq = index, scaled


def masks_padding(model: nn.Module) -> bool:
    """Whether torch's rules give some trained embedding another gradient than the true one: none for its padding token.

    Trained: its weight, or the factors of an adapter around it.
    """
    return any(
        any(p.requires_grad for p in owner.parameters())
        for owner in model.modules()
        for module in (owner, getattr(owner, "base_layer", None))
        if isinstance(module, nn.Embedding) and (module.padding_idx is not None or module.scale_grad_by_freq)
    )


@contextmanager
def _cut_to_positions(layer: nn.Module | None, bucket: Bucket) -> Iterator[list[bool]]:
    """Have `layer` see only the hidden states that predict completion tokens. Yields a list that is filled when it did."""
    used: list[bool] = []
    if layer is None:
        yield used
        return

    def cut(_module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        if hidden.shape[:2] != bucket.input_ids.shape:
            return args
        used.append(True)
        rows, positions = bucket.rows.to(hidden.device), bucket.positions.to(hidden.device)
        return (hidden[rows, positions], *args[1:])

    handle = layer.register_forward_pre_hook(cut)
    try:
        yield used
    finally:
        handle.remove()


def completion_logits(model: nn.Module, bucket: Bucket, temperature: float) -> Tensor:
    """Logits over the vocabulary that predict each completion token, divided by the temperature.

    Returns (m, V), m the bucket's completion tokens, in the order of `bucket.rows`; float32, or float64 from a float64
    model. Gradients flow through unless the caller switched them off.

    Raises ValueError for logits that are not finite, naming the sequence.
    """
    with _cut_to_positions(output_layer(model), bucket) as cut:
        logits = call_model(model, bucket)
    if not cut:
        logits = logits[bucket.rows, bucket.positions]
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    if not bool(torch.isfinite(logits.detach().sum())):
        raise_if_broken(logits, bucket)
    return logits


def call_model(model: nn.Module, bucket: Bucket) -> Tensor:
    """The model's logits for a bucket, on its device, (n, l, V) but for what hooks on its output layer make of them.

    Raises ValueError where the model inserts or drops positions, gives no `.logits`, or has no such token.
    """
    _check_tokens(model, bucket)
    arguments = {}
    accepts = _forward_parameters(model)
    if "position_ids" in accepts:
        # One row a sequence: a model that makes its own (1, l) positions would sum gradients over the batch.
        length = bucket.input_ids.shape[1]
        counted = torch.arange(length, device=bucket.input_ids.device).expand(bucket.input_ids.shape)
        arguments["position_ids"] = counted if bucket.position_ids is None else bucket.position_ids
    if bucket.attention_mask is not None:
        # Additive, which every attention implementation that takes a mask of four dimensions understands.
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(bucket.attention_mask.shape, dtype=dtype, device=bucket.input_ids.device)
        arguments["attention_mask"] = mask.masked_fill_(~bucket.attention_mask, torch.finfo(dtype).min)
    if "use_cache" in accepts:
        arguments["use_cache"] = False
    output = model(input_ids=bucket.input_ids, **arguments)
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise ValueError(
            f"the model returned a {type(output).__name__} without `.logits`: set model.config.return_dict = True, or wrap a "
            "model of your own in one whose forward returns an object with `.logits` (n, l, vocabulary)"
        )
    logits = output.logits.to(bucket.input_ids.device)
    if logits.dim() == 3 and logits.shape[:2] != bucket.input_ids.shape:
        raise ValueError(
            f"the model gave logits of shape {tuple(logits.shape)} for tokens of shape {tuple(bucket.input_ids.shape)}: it "
            "inserts or drops positions (prompt tuning does), so no logit can be matched to its token"
        )
    return logits


def _check_tokens(model: nn.Module, bucket: Bucket) -> None:
    """Raises ValueError for a token that the model's table of embeddings does not have (on a GPU its process would be lost)."""
    get = getattr(innermost_model(model), "get_input_embeddings", None)
    try:
        count = getattr(get(), "num_embeddings", None) if callable(get) else None
    except NotImplementedError:  # transformers, of a model whose table it cannot name: torch's own error is left
        count = None
    if not isinstance(count, int) or bucket.input_ids.is_meta:  # a pass that is counted, and not made
        return
    largest = max(int(bucket.input_ids.max()), int(bucket.targets.max()))
    if largest >= count:
        raise ValueError(
            f"token {largest} is beyond the model's vocabulary of {count}: the sequences are another tokenizer's, or the model "
            "was not resized to its tokenizer (model.resize_token_embeddings)"
        )


def raise_if_broken(logits: Tensor, bucket: Bucket, tokens: Tensor | None = None) -> None:
    """Raises ValueError for NaN or +infinite (m, V) logits, naming the sequence; `tokens`: which (m,) of the bucket they are.

    Minus infinity alone is legal: a token the model rules out.
    """
    bad = (logits.detach().isnan() | logits.detach().isposinf()).any(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        sequence = int(bucket.sequences[first if tokens is None else int(tokens[first])])
        raise ValueError(
            f"sequence {sequence}: the model gave NaN or infinite logits on it; its weights are broken "
            "(check the checkpoint) or the numbers overflowed (load the model in float32)"
        )


def _forward_parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(inspect.unwrap(innermost_model(model).forward)).parameters)
