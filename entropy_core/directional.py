"""Derivatives along one direction: row sums of the kernel and shares of tokens, with neither matrix
nor rows.

    u a direction over all trainable parameters,  D f = df(theta + s u)/ds at s = 0,  z = logits / temperature,  zdot = D z

    D log pi(a_k) = zdot_{a_k} - sum_a pi_a zdot_a             D H_k = -sum_a pi_a (log pi_a + H_k) zdot_a

    sum_i w_i K1(t, i) = D S_t   along  u = P sum_i w_i dS_i   for all t at once: O(n) work instead of O(n^2)
    <dS_i, u>          = D S_i                                 for all i at once; token k's part of it is D log pi(a_k)
    <E_t, u>           = sum_k [ alpha_k D H_k + gamma_k D log pi(a_k) ]       alpha, gamma: entropy_core.entropy

Two ways to D: "forward" carries it along with one forward pass (dual numbers), exact to rounding
and without a graph; "central" takes (4 d(e) - d(2e))/3 of central differences d, whose error is of
order e^4, and works for every model.

Symbols: S score, P preconditioner, w weights of training sequences; K1 and E_t as in
entropy_core.kernel. Units: nats per unit of s. Source: docs/theory/fisher-kernel.md, "Properties
that are checked".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_core.batch import Bucket, SequenceBatch, length_buckets
from entropy_core.cut_weights import any_of, open_cut, outermost_gathered, total_of
from entropy_core.entropy import Estimator, entropy_coefficients
from entropy_core.gradients import trainable_parameters
from entropy_core.passes.forward import completion_logits, output_layer
from entropy_core.passes.logits import bounded_logprobs, logit_chunks
from entropy_core.passes.position_table import check_length
from entropy_core.passes.settings import DEFAULT_PASSES, PassSettings
from entropy_core.passes.state import PassState, open_passes
from entropy_core.scores import TokenStatistics, scatter_statistics, token_statistics

Method = Literal["auto", "forward", "central"]

_LARGEST_CHANGE = 0.05  # nats by which a central difference moves the fastest token at most; curvature may ask for less
_PILOT_SEQUENCES = 8


class SequenceDerivatives(NamedTuple):
    """Derivatives of log-probabilities along one direction u, of every sequence and token.

    Attributes:
        sequences: (N,) float64 <dS_i, u>.
        tokens: (N, L) token k's part D log pi(a_k) of it, 0 outside completions.
    """

    sequences: Tensor
    tokens: Tensor


def token_derivatives(
    model: nn.Module,
    batch: SequenceBatch,
    direction: Mapping[str, Tensor],
    passes: PassSettings = DEFAULT_PASSES,
    method: Method = "auto",
    hold_padding: bool = False,
) -> TokenStatistics:
    """D log pi(a_k) in `logprobs` and D H_k in `entropies`, both (N, L) in the batch's layout, 0
    outside completions.

    Args:
        direction: name -> tensor of the parameter's shape, over all trainable parameters; any
            scale, weights are not stepped.
        method: "forward" needs a forward-mode rule for every operation of the model; "central"
            none, but is good to some 1e-4 of the whole in float32 and moves the weights while it
            runs (they are restored bit by bit, also on an exception); "auto" takes it where
            "forward" fails.
        hold_padding: count no movement of a padding token's input embedding, nor of norms that a
            module holds fixed, as the gradient in training does (`as_trained` in
            entropy_core.gradients; "central" moves the norms all the same).

    Raises:
        ValueError: the direction does not fit the parameters or is not finite, for an unknown
            method, and with method="forward" where an operation has no forward-mode rule (naming
            the module).
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}: choose 'auto', 'forward' or 'central'")
    parameters = trainable_parameters(model)
    direction = _whole(direction, parameters)
    check_length(model, int(batch.scored_lengths.max()) - 1)
    cut = open_cut(model)
    if not any(any_of([bool(part.any()) for part in direction.values()])):  # no weight decay, say
        some = next(iter(direction.values()))
        nothing = torch.zeros(
            batch.input_ids.shape, dtype=torch.promote_types(some.dtype, torch.float32), device=batch.device
        )
        return TokenStatistics(nothing, nothing.clone())
    with ExitStack() as held:
        held.enter_context(_padding_embeddings_held(model) if hold_padding else PassState.of(model).attached_norms())
        if method == "forward" and cut is not None:
            raise ValueError("a model that is cut over processes has no forward mode: use method='central'")
        if method != "central" and cut is None:
            try:
                return _forward_mode(model, batch, direction, parameters, passes)
            except _NoForwardModeError:
                if method == "forward":
                    raise
        return _central_difference(model, batch, direction, passes)


def sequence_derivatives(
    model: nn.Module,
    batch: SequenceBatch,
    direction: Mapping[str, Tensor],
    passes: PassSettings = DEFAULT_PASSES,
    method: Method = "auto",
    hold_padding: bool = True,
) -> SequenceDerivatives:
    """<dS_i, direction> of every sequence, and every token's part of it, from one pass.

    With hold_padding the rows dS_i are those of the training step, by torch's rule for padding
    embeddings (`as_trained`); without, true derivatives, as in kernels. They differ only where such
    an embedding is trained.
    """
    found = token_derivatives(model, batch, direction, passes, method, hold_padding)
    return SequenceDerivatives(found.scores(), found.logprobs)


def entropy_derivatives(
    statistics: TokenStatistics,
    derivatives: TokenStatistics,
    batch: SequenceBatch,
    estimator: Estimator = "rao_blackwell",
    per_token: bool = True,
) -> Tensor:
    """(N,) float64 <E_t, u>: each sequence's term of an estimate of D h (per_token) or D H; their
    mean is the estimate.

    Args:
        statistics: the batch's own.
        derivatives: its `token_derivatives` along u. All estimators come from the same pair.
    """
    c = entropy_coefficients(statistics, batch, estimator, per_token)
    return (c.entropy * derivatives.entropies.double() + c.logprob * derivatives.logprobs.double()).sum(1)


@contextmanager
def weights_moved(model: nn.Module, direction: Mapping[str, Tensor], scale: float) -> Iterator[None]:
    """The trainable parameters at theta + scale * direction; restored bit by bit on leaving,
    however that happens.
    """
    parameters = trainable_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, p in parameters.items():
                p.add_(direction[name].to(p.dtype), alpha=scale)
        _give_back(model)
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
        _give_back(model)


def _give_back(model: nn.Module) -> None:
    """Of a model that is cut over processes: the next pass is to gather the weights that were moved."""
    cut = open_cut(model)
    if cut is not None:
        cut.give_back()


class _NoForwardModeError(ValueError):
    """An operation has no forward-mode rule."""


class _CompletionLogits(nn.Module):
    """`completion_logits` as a module, so that its parameters can be replaced by dual numbers for
    one call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def forward(self, bucket: Bucket, temperature: float) -> Tensor:
        with PassState.of(self.model) as state, state.sharing(bucket) as agreed:
            logits = completion_logits(self.model, bucket, temperature)
        return logits if agreed() else completion_logits(self.model, bucket, temperature)


def _forward_mode(
    model: nn.Module,
    batch: SequenceBatch,
    direction: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    passes: PassSettings,
) -> TokenStatistics:
    with open_passes(model):
        # Building the wrapper inside: it must not leave a mark on the model's training flags.
        wrapper = _CompletionLogits(model).eval()
        places, values = [], []
        # Logits of a trained output layer are whole tensors, twice: smaller buckets then, as for gradients.
        layer = output_layer(model)
        fewest = layer is not None and not any(p.requires_grad for p in layer.parameters())
        for bucket in length_buckets(batch, passes.token_batch_size, fewest):
            with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                duals = {
                    f"model.{name}": forward_ad.make_dual(p.detach(), direction[name]) for name, p in parameters.items()
                }
                try:
                    logits = torch.func.functional_call(wrapper, duals, (bucket, batch.temperature))
                except NotImplementedError as error:
                    raise _NoForwardModeError(
                        f"{_culprit(error.__traceback__, wrapper)} has no forward-mode derivative "
                        f"({(str(error).strip() or type(error).__name__).splitlines()[0]}); use method='central'"
                    ) from error
                primal, tangent = forward_ad.unpack_dual(logits)
            if tangent is None:
                raise ValueError(
                    "the model's logits carry no forward-mode derivative (does it detach them from its parameters, or compute "
                    "them outside torch?); use method='central'"
                )
            places.append((bucket.sequences, bucket.columns))
            values.append(_tangents(primal, tangent, bucket.targets))
    at = (torch.cat([rows for rows, _ in places]), torch.cat([columns for _, columns in places]))
    return scatter_statistics(batch, at, *(torch.cat(parts) for parts in zip(*values, strict=True)))


def _tangents(logits: Tensor, tangent: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(D log pi, D H), each (m,), from logits and their derivative (m, V); see the formulas above."""
    mean = torch.empty(len(targets), dtype=logits.dtype, device=logits.device)
    entropies = torch.empty_like(mean)
    for part in logit_chunks(logits):
        logprobs = bounded_logprobs(logits[part], torch.logsumexp(logits[part], 1))
        probabilities = logprobs.exp()
        mean[part] = (probabilities * tangent[part]).sum(1)
        entropy = -(probabilities * logprobs).sum(1, keepdim=True)
        entropies[part] = -(probabilities * (logprobs + entropy) * tangent[part]).sum(1)
    return tangent.gather(1, targets[:, None]).squeeze(1) - mean, entropies


def _culprit(trace: TracebackType | None, wrapper: nn.Module) -> str:
    """The innermost of the model's modules whose forward was running when the exception arose."""
    names = {id(module): name.removeprefix("model.") for name, module in wrapper.named_modules()}
    found = "the model"
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = f"module {names[id(module)]!r} ({type(module).__name__})"
        trace = trace.tb_next
    return found


def _central_difference(
    model: nn.Module, batch: SequenceBatch, direction: Mapping[str, Tensor], passes: PassSettings
) -> TokenStatistics:
    pilot = batch.select(torch.linspace(0, len(batch) - 1, min(len(batch), _PILOT_SEQUENCES)).round().long())
    step = _central_step(model, pilot, direction, passes)
    if step is None:
        nothing = torch.zeros_like(token_statistics(model, batch, passes).logprobs)
        return TokenStatistics(nothing, nothing.clone())
    near, far = (_difference(model, batch, direction, e, passes) for e in (step, 2 * step))
    return TokenStatistics(
        *((4 * n - f) / 3 for n, f in ((near.logprobs, far.logprobs), (near.entropies, far.entropies)))
    )


def _difference(
    model: nn.Module, batch: SequenceBatch, direction: Mapping[str, Tensor], step: float, passes: PassSettings
) -> TokenStatistics:
    with weights_moved(model, direction, step):
        above = token_statistics(model, batch, passes)
    with weights_moved(model, direction, -step):
        below = token_statistics(model, batch, passes)
    return TokenStatistics(
        (above.logprobs - below.logprobs) / (2 * step), (above.entropies - below.entropies) / (2 * step)
    )


def _central_step(
    model: nn.Module, pilot: SequenceBatch, direction: Mapping[str, Tensor], passes: PassSettings
) -> float | None:
    """The e at which curvature and rounding cost about the same; None where nothing moves.

    With r = |d(e) - d(2e)| / 3 |d|, the relative error of d(e), the combination's error is about 4
    r^2 from curvature and 10 eps / sqrt(r) from rounding (eps of the arithmetic), whose sum is
    least at r = (10 eps / 16)^(2/5).
    """
    parameters = trainable_parameters(model)
    squares = [
        sum(float(part.detach().double().square().sum()) for part in of.values()) for of in (direction, parameters)
    ]
    length, size = (square**0.5 for square in total_of(*squares))
    if length == 0.0:
        return None
    step = 1e-3 * (size or 1.0) / length
    for _ in range(20):  # until the fastest token moves by about as much as it may
        moved_by = step * float(_difference(model, pilot, direction, step, passes).logprobs.abs().max())
        too_far = step * length > 10 * (size or 1.0)
        if too_far and moved_by == 0.0:
            return None
        if too_far or 0.3 < moved_by / _LARGEST_CHANGE <= 1:
            break
        step *= min(1e3, max(1e-3, 0.7 * _LARGEST_CHANGE / moved_by)) if moved_by > 0 else 1e3
    own = token_statistics(model, pilot, passes).logprobs.dtype
    longest = step
    for precision in (own, torch.float32):  # a float64 model may hold modules that round to float32 inside
        wanted, step = (10 * torch.finfo(precision).eps / 16) ** 0.4, longest
        for _ in range(3):
            near, far = (_difference(model, pilot, direction, e, passes).logprobs for e in (step, 2 * step))
            error = float((near - far).norm() / (3 * near.norm()).clamp(min=torch.finfo(near.dtype).tiny))
            if error < 3 * wanted:
                return step
            step *= max(1e-3, (wanted / error) ** 0.5)
    return step


@contextmanager
def _padding_embeddings_held(model: nn.Module) -> Iterator[None]:
    """Input embeddings of padding tokens stay what they are, wherever the parameters move."""
    handles = []
    for module in model.modules():
        base = getattr(module, "base_layer", module)  # an adapter around an embedding masks as the embedding does
        trained = any(p.requires_grad for p in module.parameters())
        if isinstance(base, nn.Embedding) and base.padding_idx is not None and trained:
            index = base.padding_idx
            with torch.no_grad(), outermost_gathered(model):
                row = module(torch.tensor([index], device=base.weight.device))[0]

            def hold(_module: nn.Module, args: tuple, output: Tensor, index: int = index, row: Tensor = row) -> Tensor:
                return torch.where((args[0] == index)[..., None].to(output.device), row, output)

            handles.append(module.register_forward_hook(hold))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole(direction: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The direction in the parameters' own order, devices and precision. Raises ValueError where it does not fit."""
    missing = [name for name in parameters if name not in direction]
    if missing:
        raise ValueError(
            f"the direction lacks {len(missing)} of {len(parameters)} trainable parameters, e.g. {missing[0]!r}: it belongs to "
            "another model"
        )
    found = {}
    for name, parameter in parameters.items():
        part = direction[name].detach()
        if part.shape != parameter.shape:
            raise ValueError(
                f"the direction of {name!r} is {tuple(part.shape)}, the parameter {tuple(parameter.shape)}"
            )
        if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
            raise ValueError(f"the direction of {name!r} holds values that are not finite")
        found[name] = part.to(parameter)
    return found
