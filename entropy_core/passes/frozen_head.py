"""Log-probabilities and entropies of completion tokens, without a tensor of (tokens, vocabulary) where the head is frozen.

    z = W y / temperature,   d log pi(a)/dy = (W_a - W^T pi) / temperature,   dH/dy = -W^T [pi (log pi + H)] / temperature

y is the hidden state that predicts a token, W the output layer. Both derivatives are vectors of y's width, so they are formed
in the forward pass, a few tokens at a time, while these tokens' logits are at hand; a backward pass only scales them. That
takes as many multiplications as keeping the logits and going back through them, and no memory of size V a token. Several
objectives share one forward pass.

Taken where W is a plain linear layer that is not trained and nothing happens to its output (checked on two tokens of every
pass); other heads go the ordinary way. Symbols as in entropy_core.scores. Source: docs/theory/index.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from entropy_core.batch import Bucket
from entropy_core.cut_weights import outermost_gathered
from entropy_core.passes.forward import call_model, completion_logits, output_layer, raise_if_broken
from entropy_core.passes.logits import (
    LEAST_LOGPROB,
    logprobs_and_entropies,
    mean_square,
    precise_dot,
    precise_sum,
    surprisal_variances,
)
from entropy_core.passes.lora import owns_weight
from entropy_core.passes.shared_pass import Findings
from entropy_core.passes.state import PassState

_CHUNK_ELEMENTS = 2**23  # logits at a time: 32 MiB in float32
_PROBE_TOKENS = 2


class CompletionValues(NamedTuple):
    """Of a bucket's m completion tokens, each (m,), nats (variances nats^2); the first two differentiable once.

    float32 (float64 from a float64 model); entropies from a frozen head are float64.
    """

    logprobs: Tensor
    entropies: Tensor | None
    variances: Tensor | None


def completion_values(
    model: nn.Module,
    bucket: Bucket,
    temperature: float,
    *,
    with_entropies: bool = True,
    with_variances: bool = False,
) -> CompletionValues:
    """One forward pass. Without entropies the head is cheaper, most of all where gradients are wanted.

    Raises ValueError for logits that are not finite, naming the sequence.
    """
    with PassState.of(model) as state, outermost_gathered(model):
        with state.sharing(bucket) as agreed:
            found = _one_pass(model, bucket, temperature, with_entropies, with_variances, state.findings)
        if not agreed():
            found = _one_pass(model, bucket, temperature, with_entropies, with_variances, state.findings)
        return found


def _one_pass(
    model: nn.Module,
    bucket: Bucket,
    temperature: float,
    with_entropies: bool,
    with_variances: bool,
    findings: Findings,
) -> CompletionValues:
    layer = output_layer(model)
    if layer not in findings.processed_logits and _may_be_fused(layer):
        assert isinstance(layer, nn.Linear)
        hidden = _hidden_states(model, layer, bucket)
        if hidden is None:
            findings.processed_logits.add(layer)
        if hidden is not None:
            return _from_hidden(layer, hidden, bucket, temperature, with_entropies, with_variances)
    logits = completion_logits(model, bucket, temperature)
    logprobs, entropies = logprobs_and_entropies(logits, bucket.targets)
    variances = surprisal_variances(logits.detach(), entropies.detach()) if with_variances else None
    return CompletionValues(logprobs, entropies if with_entropies else None, variances)


def _may_be_fused(layer: nn.Module | None) -> bool:
    if layer is None or not isinstance(layer, nn.Linear):
        return False
    if type(layer).forward is not nn.Linear.forward or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if not owns_weight(layer):
        return False
    # A trained head goes the ordinary way without gradients too, so that one token has one log-probability, bit by bit.
    trained = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    whole = (
        type(layer.weight.data).__name__ != "DTensor"
    )  # of weights that are spread over processes only modules know all
    return layer.weight.device.type != "meta" and whole and not trained


def _hidden_states(model: nn.Module, layer: nn.Linear, bucket: Bucket) -> Tensor | None:
    """(m, width) hidden states that predict completion tokens; None where logits are not the layer's own output."""
    cut: list[Tensor] = []
    calls: list[Tensor] = []
    plain: list[bool] = []

    def catch(_module: nn.Module, args: tuple) -> tuple:
        if cut or args[0].shape[:2] != bucket.input_ids.shape:
            return args
        # layer and input may lie on other devices than the tokens: the model is cut over several
        hidden = args[0].to(layer.weight.device)
        cut.append(hidden[bucket.rows.to(hidden.device), bucket.positions.to(hidden.device)])
        return (cut[0][:_PROBE_TOKENS].detach(), *args[1:])

    def keep(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # Somebody may have put another forward on this very layer: then its weight does not say what it computes.
        expected = functional.linear(args[0].to(layer.weight.device), layer.weight, layer.bias)
        plain.append(torch.equal(expected.to(output.device).nan_to_num(), output.nan_to_num()))
        # What comes after the layer is asked about large numbers too, which a clamp or a soft cap would change.
        spread = torch.linspace(-1e3, 1e3, output.shape[-1], dtype=output.dtype, device=output.device)
        calls.append(torch.cat([output[:-1], spread.expand_as(output[-1:])]))
        return calls[-1]

    handles = [layer.register_forward_pre_hook(catch), layer.register_forward_hook(keep)]
    try:
        logits = call_model(model, bucket)
    finally:
        for handle in handles:
            handle.remove()
    called_once = len(cut) == len(calls) == 1
    if called_once and all(plain) and logits.shape == calls[0].shape:
        own = calls[0].to(logits.device)
        if torch.equal(logits.nan_to_num(), own.nan_to_num()):
            return cut[0]
    return None


def _from_hidden(
    layer: nn.Linear, hidden: Tensor, bucket: Bucket, temperature: float, with_entropies: bool, with_variances: bool
) -> CompletionValues:
    logprobs, entropies, normalizers, variances = _FrozenHead.apply(
        hidden, layer, bucket.targets.to(hidden.device), temperature, with_entropies, with_variances
    )
    logprobs, entropies, normalizers, variances = (
        values.to(bucket.targets.device) for values in (logprobs, entropies, normalizers, variances)
    )
    if not bool(torch.isfinite(normalizers.sum())):
        bad = (~torch.isfinite(normalizers)).nonzero().flatten()
        raise_if_broken((layer(hidden.detach()[bad.to(hidden.device)]) / temperature).float(), bucket, bad)
    return CompletionValues(logprobs, entropies if with_entropies else None, variances if with_variances else None)


class _FrozenHead(torch.autograd.Function):
    """hidden (m, d) -> log-probabilities, entropies, log-normalizers, variances, each (m,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: nn.Linear,
        targets: Tensor,
        temperature: float,
        wants_entropies: bool,
        with_variances: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight = layer.weight.detach()
        precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        m = len(hidden)
        logprobs, normalizers, variances = (torch.zeros(m, dtype=precise, device=hidden.device) for _ in range(3))
        entropies = torch.zeros(m, dtype=torch.float64, device=hidden.device)
        needed = ctx.needs_input_grad[0]
        score_rows = torch.empty_like(hidden) if needed else None
        entropy_rows = torch.empty_like(hidden) if needed and wants_entropies else None
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for part in (slice(start, start + step) for start in range(0, m, step)):
            z = functional.linear(hidden[part], weight, layer.bias).to(precise)
            z = z if temperature == 1.0 else z.div_(temperature)
            largest, chosen = z.amax(1), targets[part]
            logprobs[part] = z.gather(1, chosen[:, None]).squeeze(1)
            z.sub_(largest[:, None]).clamp_(min=LEAST_LOGPROB)  # log pi but for the normalizer
            p = z.exp()  # pi times their sum
            sums = precise_sum(p)
            total = sums.to(precise)
            normalizers[part] = largest + total.log()
            # log pi + H = z - sum_a pi z, without the normalizer: of a policy near the uniform one both are large, and their
            # sum is small.
            if wants_entropies or with_variances:
                mean = precise_dot(p, z) / sums
                entropies[part] = sums.log() - mean
                z -= mean.to(precise)[:, None]
            if with_variances:
                variances[part] = mean_square(p, z) / total
            if score_rows is not None:
                expected = (p.to(weight.dtype) @ weight) / total[:, None].to(weight.dtype)
                score_rows[part] = (weight[chosen] - expected).div_(temperature)
            if entropy_rows is not None:
                around = z.mul_(p).div_(total[:, None])  # pi (log pi + H)
                entropy_rows[part] = (around.to(weight.dtype) @ weight).div_(-temperature)
        logprobs -= normalizers
        ctx.save_for_backward(score_rows, entropy_rows)
        constant = (normalizers, variances) if wants_entropies else (entropies, normalizers, variances)
        ctx.mark_non_differentiable(*constant)
        return logprobs, entropies, normalizers, variances

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        score_rows, entropy_rows = ctx.saved_tensors
        total = score_rows * gradients[0][:, None].to(score_rows.dtype)
        if entropy_rows is not None:
            total.addcmul_(entropy_rows, gradients[1][:, None].to(entropy_rows.dtype))
        return total, None, None, None, None, None
