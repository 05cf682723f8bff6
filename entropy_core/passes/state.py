"""What passes need to know of one model, and the layers whose `forward` they replace: in one place, for a limited time.

While a `PassState` is open, each frozen linear layer and each LoRA layer has a `ReplacedForward`: the layer's own forward, but
inside `PassState.sharing`, where equal tokens are multiplied once (entropy_core.passes.shared_tokens, entropy_core.passes.lora).
What passes find out (a model that looks ahead, a head whose logits are processed further) is kept in `findings` as long as the
object lives, also while it is closed.

    with PassState(model):                       # opened once: one set of replacements for all calls inside
        token_statistics(model, batch)           # joins the state that is open
        per_sequence_gradients(model, batch)

Functions of entropy_core join the state that is open on their model, or open one for the call (`open_passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import nn

from entropy_core.batch import Bucket
from entropy_core.passes.forward import evaluation_mode
from entropy_core.passes.lora import adapted, is_adapter_layer, is_frozen_linear, plain_adapter
from entropy_core.passes.replaced_forward import ReplacedForward, own_forward
from entropy_core.passes.shared_pass import Findings, SharedPass
from entropy_core.passes.shared_tokens import compact
from entropy_core.passes.stopped_gradients import stopping_modules, true_gradients


class PassState:
    """The passes of one model; a context manager, for one thread.

    It may be entered again while it is open, and opened again after it was closed. The last exit takes all replacements away,
    also after an exception: parameters, hooks and attributes of the model are then as they were.

    Args:
        model: its layers are replaced while the state is open.
        true_derivatives: whether gradients that are not asked for `as_trained` go through norms that DoRA detaches
            (entropy_core.passes.stopped_gradients).

    Raises:
        RuntimeError: on entering, where another PassState is open on the model or a part of it; `PassState.of` joins that one.
    """

    _all_open: ClassVar[list[PassState]] = []

    def __init__(self, model: nn.Module, *, true_derivatives: bool = False) -> None:
        self._model, self._true_derivatives = model, true_derivatives
        self._entered = 0
        self._replaced: list[ReplacedForward] = []
        self._current: SharedPass | None = None
        self._norms_attached = False
        self.findings = Findings()

    @classmethod
    def of(cls, model: nn.Module) -> PassState:
        """The state that is open on this model, a wrapper of it or a part of it; a new one, still closed, if there is none."""
        return next((state for state in cls._all_open if state._concerns(model)), None) or cls(model)

    def _concerns(self, model: nn.Module) -> bool:
        return model is self._model or _holds(self._model, model) or _holds(model, self._model)

    def __enter__(self) -> Self:
        if self._entered == 0:
            if any(state._concerns(self._model) for state in self._all_open):
                raise RuntimeError("another PassState of this model is open: join it by PassState.of(model)")
            try:
                self._place()
            except BaseException:
                self._remove()
                raise
            self._all_open.append(self)
        self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._all_open.remove(self)
            self._remove()

    def _place(self) -> None:
        instead: dict[nn.Module, Callable[..., Any]] = {
            module: self._linear
            for module in self._model.modules()
            if type(module).forward is nn.Linear.forward or is_adapter_layer(module)
        }
        if self._true_derivatives:
            instead |= dict.fromkeys(stopping_modules(self._model), self._norm)
        # a forward that somebody else has put on a module stays theirs
        self._replaced = [ReplacedForward(m, how) for m, how in instead.items() if "forward" not in vars(m)]
        for replaced in self._replaced:
            replaced.place()

    def _remove(self) -> None:
        for replaced in self._replaced:
            replaced.remove()
        self._replaced = []

    def _linear(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """The output of a linear or LoRA layer: with equal tokens multiplied once where the pass at hand allows it."""
        current = self._current
        if current is not None and len(args) == 1 and not kwargs and current.fits(args[0]):
            # Asked at every call: adapters are switched and parameters frozen while a state is open.
            adapter = plain_adapter(layer)
            if adapter is not None:
                found = adapted(layer, adapter, args[0], current)
                if found is not None:
                    return found
            elif is_frozen_linear(layer):
                return compact(layer, args[0], current)
        return own_forward(layer, *args, **kwargs)

    def _norm(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of a module that stops gradients, DoRA's or C3A's."""
        if not self._norms_attached:
            return own_forward(module, *args, **kwargs)
        with true_gradients(module):
            return own_forward(module, *args, **kwargs)

    @contextmanager
    def sharing(self, bucket: Bucket) -> Iterator[Callable[[], bool]]:
        """Inside, a forward pass over `bucket` multiplies equal tokens once, where that is worthwhile.

        Yields a function that says, after the pass, whether tokens that were taken for equal were: if not, its numbers are
        wrong, and the pass is to be made again; this model's passes share no tokens from then on.
        """
        # Rows that hold several completions share their prompt already, and under autocast the products have other types.
        ordinary = bucket.attention_mask is not None or torch.is_autocast_enabled(bucket.input_ids.device.type)
        if ordinary or self.findings.looks_ahead or not self._replaced:
            yield lambda: True
            return
        outer, self._current = self._current, SharedPass(bucket, self.findings)
        try:
            yield self._current.agrees
        finally:
            # Backward passes may call layers again (rows by vmap), and those calls are none of this pass.
            self._current = outer

    @contextmanager
    def attached_norms(self) -> Iterator[None]:
        """Inside, passes go through norms that a module holds fixed in the backward pass, if the state has true derivatives."""
        before, self._norms_attached = self._norms_attached, True
        try:
            yield
        finally:
            self._norms_attached = before

    @property
    def stops_gradients(self) -> bool:
        """Whether gradients of this model are others as trained than true ones."""
        return self._true_derivatives and bool(stopping_modules(self._model))


def _holds(model: nn.Module, part: nn.Module) -> bool:
    return any(module is part for module in model.modules())


@contextmanager
def open_passes(model: nn.Module) -> Iterator[PassState]:
    """Evaluation mode, and the model's `PassState`, for passes inside."""
    with evaluation_mode(model), PassState.of(model) as state:
        yield state
