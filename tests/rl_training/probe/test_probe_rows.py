"""Adapters and models whose parameters are not reached by calling a module: the probe's gradient beside autograd's, taken
sequence by sequence from the model's own logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients
from entropy_core.passes.fold_rows import FoldRows
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.probe.score_term import FusedScoreTerm
from rl_training.probe.shares import TrainingSequences
from tests.entropy_core.support import right_padded
from tests.oracle.model_cases import VOCABULARY, random_sequences, randomise

SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SHAPE, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LAYERS = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**GATED, **SPECIAL, tie_word_embeddings=False))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**GATED, **SPECIAL, num_local_experts=4, num_experts_per_tok=2))


def adapted(config: peft.PeftConfig, base: Callable[[], nn.Module] = llama) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(base(), config)


# Those whose rows no hook sees or can form; True: rows exist and are used.
CASES: dict[str, tuple[bool, Callable[[], nn.Module]]] = {
    "lora": (True, adapted(peft.LoraConfig(r=3, target_modules=LAYERS))),
    "modules_to_save": (True, adapted(peft.LoraConfig(r=3, target_modules=LAYERS, modules_to_save=["embed_tokens"]))),
    "token_indices": (True, adapted(peft.LoraConfig(r=3, target_modules=LAYERS, trainable_token_indices=[3, 5, 7]))),
    "ia3": (False, adapted(peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]))),
    "experts": (False, adapted(peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=EXPERTS), mixtral)),
    "all_of_mixtral": (False, mixtral),
    "dora": (False, adapted(peft.LoraConfig(r=3, target_modules=LAYERS, use_dora=True))),
    "c3a": (False, adapted(peft.C3AConfig(block_size=8, target_modules=LAYERS))),
    "vera": (False, adapted(peft.VeraConfig(r=4, target_modules=["q_proj"]))),
    "loha": (False, adapted(peft.LoHaConfig(r=3, target_modules=LAYERS))),
    "lokr": (False, adapted(peft.LoKrConfig(r=3, target_modules=LAYERS))),
    "boft": (False, adapted(peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))),
    "adalora": (False, adapted(peft.AdaLoraConfig(target_modules=LAYERS, total_step=100))),
    "position_table": (
        False,
        lambda: OPTForCausalLM(
            OPTConfig(**{**SHAPE, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64})
        ),
    ),
    "gemma3": (False, lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GATED, head_dim=4))),
    "falcon": (False, lambda: FalconForCausalLM(FalconConfig(**SHAPE))),
    "mamba2": (
        False,
        lambda: Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=8,
                n_groups=2, chunk_size=8,
            )
        ),
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, SequenceBatch]:
    """The case's model, every parameter far from its initial value, and five prompts with seven completions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name][1]().float()
    randomise(model, 1)
    return model.eval(), right_padded(random_sequences(VOCABULARY), 0.9)


def objective_by_hand(model: nn.Module, batch: SequenceBatch, frozen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the split estimator differentiates, from the logits of each sequence alone, and its (N,) frozen entropies."""
    scores, entropies, lengths = [], [], []
    for n in range(len(batch)):
        ids, length = batch.input_ids[n][batch.attention_mask[n]], int(batch.completion_mask[n].sum())
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -length - 1 : -1].double()
        log_probabilities = (logits / batch.temperature).log_softmax(-1)
        scores.append(log_probabilities.gather(1, ids[-length:, None]).sum())
        entropies.append(-(log_probabilities.exp() * log_probabilities).sum())
        lengths.append(length)
    S, H, T = torch.stack(scores), torch.stack(entropies), torch.tensor(lengths).double()
    frozen = H.detach() if frozen is None else frozen
    h = frozen.sum() / T.sum()
    return (H + (frozen - h * T) * S).sum() / T.sum(), frozen


def by_hand(model: nn.Module, batch: SequenceBatch) -> dict[str, Tensor]:
    """grad h by the split estimator, from one call of autograd."""
    objective, _ = objective_by_hand(model, batch)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(objective, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def new_probe(model: nn.Module, **settings: object) -> SimpleEntropyProbe:
    config = {"mode": "simple", "preset": "accurate", "rollouts": "fresh", "averaging": 0.0, **settings}
    return SimpleEntropyProbe(EntropyProbeConfig(**config), model, check_sampler=False)  # tokens are any


def along(gradient: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    return sum(float((gradient[n].double() * d.double()).sum()) for n, d in direction.items())


def size(values: dict[str, Tensor]) -> float:
    return sum(float(v.double().square().sum()) for v in values.values()) ** 0.5


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dora", "c3a")])
def test_every_adapter_and_model_is_predicted_with_its_standard_error(name: str) -> None:
    model, batch = made(name)
    gradient = by_hand(model, batch)
    direction = {n: g + 0.1 * size(gradient) * torch.randn_like(g) / g.numel() ** 0.5 for n, g in gradient.items()}
    probe = new_probe(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        changes = [probe.compute_delta_h_fast(batch, None, direction) for _ in range(2)]
    said = [str(w.message) for w in seen if "entropy probe" in str(w.message)]
    rows = CASES[name][0]
    assert len(said) == (0 if rows else 1), said
    assert rows or ("predictions are right" in said[0] and "over each fold" in said[0])
    for change in changes:
        assert change.total.value == pytest.approx(along(gradient, direction), rel=1e-5), (
            "the gradient is not the model's"
        )
        assert change.total.standard_error > 0, "the folds were given up"


@pytest.mark.parametrize(("name", "apart"), [("dora", 3e-2), ("c3a", 1e-2)])
def test_a_gradient_that_autograd_gives_otherwise_is_the_derivative(name: str, apart: float) -> None:
    """DoRA's holds the norm of the weight fixed, which the step does not, and C3A's is wrong in front of its layers: the truth
    is a central difference.
    """
    model, batch = made(name)
    model.double()
    held = by_hand(model, batch)
    values, step = [], (3e-3 if name == "dora" else 3e-2) / size(held)  # layers compute a part in float32
    with torch.no_grad():
        frozen = objective_by_hand(model, batch)[1]
        for sign in (1, -2, 1):
            for name, p in model.named_parameters():
                p.add_(held[name], alpha=sign * step) if name in held else None
            values.append(float(objective_by_hand(model, batch, frozen)[0]))
    slope = (values[0] - values[1]) / (2 * step)
    with pytest.warns(RuntimeWarning, match="over each fold"):
        change = new_probe(model).compute_delta_h_fast(batch, None, held)
    assert change.total.value == pytest.approx(slope, rel=2e-3)
    assert along(held, held) != pytest.approx(slope, rel=apart), "the two derivatives do not differ here"


def test_folds_by_rows_and_by_passes_have_the_same_standard_error() -> None:
    model, batch = made("lora")
    direction = by_hand(model, batch)
    by_rows, by_passes = new_probe(model), new_probe(model)
    by_passes._take.rows.begin({n: p for n, p in model.named_parameters() if p.requires_grad})
    by_passes._take.rows.fail("made up")
    with pytest.warns(RuntimeWarning, match="made up"):
        plain = by_passes.compute_delta_h_fast(batch, None, direction)
    rows = by_rows.compute_delta_h_fast(batch, None, direction)
    assert plain.total.standard_error == pytest.approx(rows.total.standard_error, rel=1e-4)


def test_a_parameter_without_gradient_is_looked_at_when_it_has_one() -> None:
    """LoRA's A at the start, where B is zero: nothing is known of its rows then."""

    class FunctionalA(nn.Module):
        """y = x + B A x: B by its module, A by its weight."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
            self.b.weight.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(nn.functional.linear(x, self.a.weight))

    model, batch = made("lora")
    base = model.get_base_model()
    base.requires_grad_(False)
    base.lm_head = nn.Sequential(FunctionalA(), base.lm_head)
    probe = new_probe(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.compute_delta_h_fast(batch, None, by_hand(base, batch))
    with torch.no_grad():
        base.lm_head[0].b.weight.normal_(generator=torch.Generator().manual_seed(0))
    gradient = by_hand(base, batch)
    assert gradient["lm_head.0.a.weight"].any()
    with pytest.warns(RuntimeWarning, match=r"lm_head\.0\.a\.weight"):
        change = probe.compute_delta_h_fast(batch, None, gradient)
    assert change.total.value == pytest.approx(along(gradient, gradient), rel=1e-5)


def test_another_trainable_set_is_looked_at_anew_and_begins_new_averages() -> None:
    """Adapters are trained first, then IA3-like factors of the same model as well."""
    model, batch = made("ia3")
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("q_proj.weight")
    probe = new_probe(model, averaging=0.5)

    def step() -> tuple[float, float, float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        gradient = by_hand(model, batch)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        for n, p in model.named_parameters():
            p.grad = gradient[n].clone() if p.requires_grad else None
        probe.observe(batch)
        probe.before_step(optimizer)
        optimizer.step()
        change = probe.after_step()
        assert change is not None
        taken = {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}
        return change.total.value, along(gradient, taken), change.total.standard_error

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, wanted, _ = step()
    assert value == pytest.approx(wanted, rel=1e-3)
    for name, p in model.named_parameters():
        p.requires_grad = "ia3" in name
    with pytest.warns(RuntimeWarning, match="ia3"):
        value, wanted, error = step()
    assert value == pytest.approx(wanted, rel=1e-3) and error > 0


def test_rows_below_float32_are_judged_by_their_rounding() -> None:
    parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    exact = torch.linspace(0.5, 1.5, 64)
    rows = FoldRows()
    rows.begin({"a": parameter})
    rows.check({"a": torch.stack([exact / 2, exact / 2])}, ["a"], [exact.bfloat16()])
    assert rows.unseen() == []
    rows.begin({"a": nn.Parameter(torch.ones(64))})
    with pytest.raises(ValueError, match="'a' do not add up"):
        rows.check({"a": exact[None]}, ["a"], [exact.bfloat16()])


def test_shares_go_through_sequences_one_by_one_where_there_are_no_rows() -> None:
    """Of a loss -sum_i w_i S_i: they add up to the batch part, and each is what its sequence's own gradient gives."""
    model, batch = made("ia3")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1.0, 2.0, len(batch), dtype=torch.float64) / 100
    optimizer = torch.optim.AdamW(named.values(), lr=1e-4, eps=1e-3)
    gradients = [
        batch_gradients(model, batch.select([i]), [score_coefficients(batch.select([i]))])[0] for i in range(7)
    ]
    for name, p in named.items():
        p.grad = -sum(float(w) * g[name] for w, g in zip(weights, gradients, strict=True))
    entropy = by_hand(model, batch)
    probe = new_probe(model, mode="attribution")
    with pytest.warns(RuntimeWarning) as seen:
        probe.observe(batch)
        probe.before_step(optimizer, TrainingSequences(batch, weights, weights))
    scale = {n: 1e-4 / (p.grad.abs() + 1e-3) for n, p in named.items()}  # the first step: m and v are of this gradient
    optimizer.step()
    change = probe.after_step()
    assert change is not None and change.shares is not None
    said = [str(w.message) for w in seen if "entropy probe" in str(w.message)]
    assert len(said) == 2 and "backward pass for each of 7 sequences" in said[1], said
    wanted = [
        float(w) * along(entropy, {n: s * g[n] for n, s in scale.items()})
        for w, g in zip(weights, gradients, strict=True)
    ]
    assert change.shares.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert float(change.shares.sum()) == pytest.approx(change.batch.value, rel=1e-4)


def test_fused_refuses_such_an_adapter_by_name() -> None:
    for name in ("ia3", "dora", "token_indices"):
        with pytest.raises(ValueError, match="set fused=false"):
            FusedScoreTerm(made(name)[0], 4)
