"""The score term of the entropy gradient out of the training backward itself, over all sequences of the step.

    E[T] grad h = E[sum_k dH_k] + E[(sum_k H_k - h T) dS]                        (the split estimator, entropy_core.entropy)

The second term, which carries nearly all of the estimator's noise, has one weight a sequence. Where the loss is linear in the
scores, the training backward carries  -w_i dS_i  through every module, row by row, so the rows that make the weights'
gradient make a second sum with v_i / w_i in place of 1 for the price of the adapters' own weight gradients:

    X_f = (1/sum T) sum_{i in f} (sum_k H_ik - h T_i) dS_i            entropy side, by fold of prompts
    G_f = -sum_{i in f} w_i dS_i                                      update side,  sum_f G_f = the loss gradient

Along the update of this very batch X meets its own sequences (t = t'); `across_folds` pairs G_f with the X of all *other*
folds alone, which takes those terms out.

The guard. w_i is read off the gradient that reaches each token's log-probability. It must be one number over a sequence's
tokens (ratio clipping and KL make it vary), nothing may reach the entropies (an entropy bonus), dropout must be off, and
a sequence without weight must have company: only whole prompts may drop out, since within a prompt the choice would depend
on rewards. Otherwise there is an error, not another number. Zero-weight prompts are left out and counted.

Source: docs/theory/entropy-gradient.md, "Split".
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_core.fold_gradients import FoldGradients
from entropy_core.gradients import trainable_parameters
from entropy_core.processes import Processes

# Spread of w_ik over a sequence's tokens, relative to its size, that rounding explains.
_SAME_WEIGHT = 1e-3


@dataclass
class _MicroBatch:
    """fold, mask: (n,) and (n, L) of the completions; scale: (n, 3) columns of the three sums, once the loss is known."""

    prompts: list[tuple[int, ...]]
    folds: Tensor
    mask: Tensor
    entropies: Tensor | None = None
    scale: Tensor | None = None
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = self.mask.sum(1).double()


@dataclass(frozen=True)
class FusedScore:
    """One step's score term. gradient: X by fold. update: G by fold. sequences: that had weight; dropped: that had none."""

    gradient: FoldGradients
    update: FoldGradients
    sequences: int
    dropped: int
    _weighted: dict[str, Tensor]
    _lengths: dict[str, Tensor]
    _entropy: Tensor
    _tokens: Tensor

    def across_folds(self, step_per_gradient: Mapping[str, Tensor], clip: float) -> Tensor:
        """(F,) float64 with sum = <X, dtheta_batch> without pairs of one fold; dtheta_batch = -step_per_gradient * clip * G.

        The f-th entry pairs G_f with the score term of the other folds' sequences alone, normalised as theirs.
        """
        count = self.gradient.count
        device = next(iter(self.update.folds.values())).device  # where the processes' group can send from
        products = torch.zeros((count, count), dtype=torch.float64, device=device)
        lengths = torch.zeros_like(products)
        for name, update in self.update.folds.items():
            step = (-clip * step_per_gradient[name] * update).flatten(1).double()
            products += (self._weighted[name].flatten(1).double() @ step.T).to(products)
            lengths += (self._lengths[name].flatten(1).double() @ step.T).to(lengths)
        sharing = self.gradient.processes
        products, lengths = sharing.sum(products).cpu(), sharing.sum(lengths).cpu()
        total_entropy, total_tokens = self._entropy.sum() - self._entropy, self._tokens.sum() - self._tokens
        others = 1.0 - torch.eye(count, dtype=torch.float64)
        h = total_entropy / total_tokens
        return ((products * others).sum(0) - h * (lengths * others).sum(0)) / total_tokens


class FusedScoreTerm:
    """Hooks on a model in training. For each micro-batch call `begin`, let the trainer run forward and backward, and after
    the last one `take`.

    Raises ValueError where a trainable parameter is not the weight or bias of a Linear.
    """

    def __init__(self, model: nn.Module, folds: int, sharing: Processes | None = None) -> None:
        self._model, self._folds, self._sharing = model, max(2, folds), sharing or Processes()
        self._names = {id(p): name for name, p in trainable_parameters(model).items()}
        self._reset()
        covered: set[str] = set()
        self._handles = [model.register_forward_hook(self._see_output)]
        for module in model.modules():
            own = {
                k: self._names[id(p)] for k, p in module._parameters.items() if p is not None and id(p) in self._names
            }
            if own and type(module).forward is not nn.Linear.forward:
                self.detach()
                raise ValueError(
                    f"fused=true needs all trained weights in linear layers, and {next(iter(own.values()))!r} is not: train "
                    "adapters (LoRA), or set fused=false"
                )
            if own:
                covered |= set(own.values())
                self._handles.append(module.register_forward_hook(self._layer_hook(own)))

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._prompts: dict[tuple[int, ...], int] = {}
        self._seen: list[_MicroBatch] = []
        self._current: _MicroBatch | None = None
        self._trouble: str | None = None

    def begin(self, prompts: list[tuple[int, ...]], completion_mask: Tensor) -> None:
        """A micro-batch is about to run: each sequence's prompt (equal tuples share a fold) and (n, L) completion mask."""
        folds = torch.tensor([self._fold(p) for p in prompts], device=completion_mask.device)
        self._current = _MicroBatch(prompts, folds, completion_mask.bool())
        self._seen.append(self._current)

    def _fold(self, prompt: tuple[int, ...]) -> int:
        if self._sharing.size > 1:  # the same in every process
            return zlib.crc32(repr(prompt).encode()) % self._folds
        return self._prompts.setdefault(prompt, len(self._prompts)) % self._folds

    def _see_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        micro = self._current
        if micro is None or not torch.is_grad_enabled():
            return
        self._current = None  # what runs after the micro-batch's own forward pass is none of ours
        logprobs, entropies = getattr(output, "log_probs", None), getattr(output, "entropy", None)
        if logprobs is None or entropies is None or len(logprobs) != len(micro.mask):
            self._trouble = "the trainer's forward gives no log-probabilities and entropies of a whole micro-batch"
            return
        width = micro.mask.shape[1]
        micro.entropies = (entropies.detach()[:, -width:].double() * micro.mask).sum(1)
        if entropies.requires_grad:
            entropies.register_hook(self._refuse_entropy_gradient)
        auxiliary = getattr(output, "aux_loss", None)
        if auxiliary is not None and auxiliary.requires_grad:
            auxiliary.register_hook(self._refuse_auxiliary_loss)
        logprobs.register_hook(lambda grad: self._read_weights(micro, grad.detach()[:, -width:].double()))

    def _refuse_entropy_gradient(self, grad: Tensor) -> None:
        if bool(grad.any()):
            self._trouble = "the loss has an entropy term"

    def _refuse_auxiliary_loss(self, grad: Tensor) -> None:
        if bool(grad.any()):
            self._trouble = "the loss has the router's auxiliary loss in it (set router_aux_loss_coef=0)"

    def _read_weights(self, micro: _MicroBatch, grad: Tensor) -> None:
        mask = micro.mask
        weight = -(grad * mask).sum(1) / micro.lengths.clamp(min=1)
        spread = ((grad + weight[:, None]).abs() * mask).amax(1)
        if bool((spread > _SAME_WEIGHT * weight.abs() + 1e-12).any()):
            self._trouble = (
                "a sequence's tokens have unequal weights in the loss (a ratio to an earlier policy, a mask of tokens)"
            )
            return
        inverse = torch.where(weight == 0, torch.zeros_like(weight), -1.0 / weight)
        assert micro.entropies is not None
        micro.scale = torch.stack([inverse * micro.entropies, inverse * micro.lengths, torch.ones_like(inverse)], 1)

    def _layer_hook(self, own: dict[str, str]) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            micro = self._current
            if micro is None or not output.requires_grad or not torch.is_grad_enabled():
                return
            x = args[0].detach()
            output.register_hook(lambda dy: self._receive(own, micro, x, dy.detach()))

        return hook

    def _receive(self, own: dict[str, str], micro: _MicroBatch, x: Tensor, dy: Tensor) -> None:
        if micro.scale is None:
            self._trouble = self._trouble or "no weight of the loss was seen before a layer's gradient"
        if self._trouble is not None or micro.scale is None:
            return
        onehot = nn.functional.one_hot(micro.folds, self._folds).double()
        columns = (micro.scale[:, :, None] * onehot[:, None, :]).flatten(1)  # (n, 3 F)
        for key, name in own.items():
            rows = torch.bmm(dy.transpose(1, 2), x.to(dy.dtype)) if key == "weight" else dy.sum(1)
            part = (columns.T.to(rows) @ rows.flatten(1)).view(3, self._folds, *rows.shape[1:]).float()
            if name in self._sums:
                self._sums[name] += part
            else:
                self._sums[name] = part

    def abandon(self) -> None:
        """Forget the step's micro-batches."""
        self._reset()

    def take(self) -> FusedScore:
        """The score term of all micro-batches since the last call.

        Raises ValueError where the guard refuses (see the module's docstring), saying why.
        """
        seen, sums, trouble = self._seen, self._sums, self._trouble
        self._reset()
        if trouble is None and any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in self._model.modules()):
            trouble = "dropout is on"
        if trouble is None and (not seen or set(sums) != set(self._names.values())):
            trouble = "not every trained weight was reached by the backward pass"
        kept = torch.zeros((self._folds, 3), dtype=torch.float64)
        sequences = dropped = 0
        if trouble is None:
            live: dict[tuple[int, ...], set[bool]] = {}
            for micro in seen:
                assert micro.scale is not None and micro.entropies is not None
                has_weight = (micro.scale[:, 1] != 0).cpu()
                for prompt, alive in zip(micro.prompts, has_weight.tolist(), strict=True):
                    live.setdefault(prompt, set()).add(alive)
                sequences, dropped = sequences + int(has_weight.sum()), dropped + int((~has_weight).sum())
                values = torch.stack([micro.entropies, micro.lengths, torch.ones_like(micro.lengths)], 1).cpu()
                values *= has_weight.cpu()[:, None]
                kept.index_add_(0, micro.folds.cpu(), values)
            if any(len(kinds) > 1 for kinds in live.values()):
                trouble = "some completions of a prompt have no weight in the loss while others do"
        device = next(self._model.parameters()).device  # where the processes' group can send from
        if self._sharing.any(trouble is not None, device):
            raise ValueError(
                f"fused=true cannot take the score term from this step: {trouble or 'another process refuses'}; set fused=false"
            )
        kept = self._sharing.sum(kept.to(device)).cpu()
        # In the model's order: other tokens reach layers in another, and processes sum one after the other.
        sums = {name: sums[name] for name in self._names.values()}
        entropy, tokens = kept[:, 0], kept[:, 1]
        if float(tokens.sum()) == 0:
            raise ValueError("fused=true cannot take the score term from this step: no sequence has weight in the loss")
        h, all_tokens = float(entropy.sum() / tokens.sum()), float(tokens.sum())
        weighted = {name: s[0] for name, s in sums.items()}
        lengths = {name: s[1] for name, s in sums.items()}
        gradient = {name: (weighted[name] - h * lengths[name]) / all_tokens for name in sums}
        return FusedScore(
            FoldGradients(gradient, self._sharing, kept[:, 2] / kept[:, 2].sum()),
            FoldGradients({name: s[2] for name, s in sums.items()}, self._sharing),
            sequences,
            dropped,
            weighted,
            lengths,
            entropy,
            tokens,
        )
