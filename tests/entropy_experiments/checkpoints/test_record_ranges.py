"""Every field of a checkpoint's record, Trainer state and optimizer groups, with values that no run has: refused
in one line, or among those that mean something.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_experiments.checkpoints.folder import read_trainer_state
from entropy_experiments.checkpoints.validation import examine_checkpoint
from entropy_experiments.console.doctor import NO, YES, diagnose
from rl_training.errors import UserError
from rl_training.run.sidecar import SIDECAR_NAME, Sidecar, read_sidecar
from tests.entropy_experiments.checkpoint_edits import reseal

HOSTILE: list[Any] = [
    float("nan"), float("inf"), -1, -1.5, 0, 1, True, False, None, 1e308, 10**30, "x", "", "\0", "x" * 10**6, [], {}, [[]], ["x"],
    [True], [-1], [10**12], [7, 7], {"x": 1}, {"x": "y"}, {"x": float("nan")},
]  # fmt: skip
# One of each type, out of range each in its own way, in `make test`; every value in `make test-long`.
KINDS = [v for v in HOSTILE if repr(v) in ("nan", "-1", "0", "True", "None", "1e+308", "'x'", "[]", "{}", "[True]")]
every_kind = pytest.mark.parametrize(
    "values", [KINDS, pytest.param(HOSTILE, marks=pytest.mark.long)], ids=["kinds", "all"]
)
# What a value of the list means something for: nothing was recorded, or so a run could have had it. Field -> values by repr.
_NOT_RECORDED = ("None",)
_TEXT = ("'x'",)
MEANINGFUL: dict[str, tuple[str, ...]] = {
    "model_name": (),
    "quantization": _NOT_RECORDED,
    "optimizer_parameter_names": (),
    "learning_rates_used": ("[7, 7]",),
    "task": _NOT_RECORDED,
    "versions": ("{}", "{'x': 'y'}"),
    "optimizer_class": _NOT_RECORDED,
    "sha256": ("{}",),
    "rollouts_sha256": _NOT_RECORDED,
    "witness": _NOT_RECORDED,
    "gradient_premise": _NOT_RECORDED,
    "entropy_controller": (*_NOT_RECORDED, *_TEXT, "''"),
    "format": ("1",),
    "rank_count": ("1",),
    "pass_rates": (),
    "sampling.temperature": ("1",),
    "sampling.top_k": ("0",),
    "sampling.top_p": ("1",),
    "sampling.max_completion_length": (),
    "sampling.eos_token_ids": (),
    "sampling.pad_token_id": ("0", "1"),
    "sampling.prompts_per_step": ("1",),
    "sampling.completions_per_prompt": ("1",),
    "sampling.chat_template_sha256": _NOT_RECORDED,
    "sampling.chat_template_kwargs": ("{}", "{'x': 1}", "{'x': 'y'}"),
    "sampling.contents_in_parts": ("True", "False"),
    "sampling.generation": ("{}",),
    "sampling.training_noise": ("[]",),
    "sampling.adapters": ("[]", "['x']"),
    "sampling.environment": (*_NOT_RECORDED, *_TEXT),
    "algorithm.max_grad_norm": ("0", "1", str(10**30)),
    "algorithm.difficulty_weighting": ("True", "False"),
    "algorithm.reject_zero_advantage": ("True", "False"),
    "algorithm.max_refill_rounds": ("0", "1"),
    "own_sha256": _NOT_RECORDED,
    "gradient_premise.step": ("0", "1"),
    "gradient_premise.made": ("True", "False"),
    "gradient_premise.trouble": _NOT_RECORDED,
    "gradient_premise.relative_error": ("None", "0", "1", "1e+308", str(10**30)),
    "gradient_premise.tolerance": ("None", "0", "1", "1e+308", str(10**30)),
    "gradient_premise.logprob_difference": ("None", "0", "1", "1e+308", str(10**30)),
}


def fields(data: dict[str, Any], model: Any = Sidecar, above: str = "") -> Iterator[str]:
    """Dotted names of all fields, those of sections too; the record has every optional section."""
    for name in model.model_fields:
        yield above + name
        inner = {"sampling", "algorithm", "witness", "gradient_premise"} & {name}
        if inner and isinstance(data[name], dict):
            annotation = model.model_fields[name].annotation
            section = next(a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields"))
            yield from fields(data[name], section, f"{above}{name}.")


def put(data: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy with one field changed."""
    changed = json.loads(json.dumps(data))
    *above, last = dotted.split(".")
    section = changed
    for name in above:
        section = section[name]
    section[last] = value
    return changed


@pytest.fixture
def ours(checkpoint_copy: Path) -> Path:
    """A checkpoint whose record's task is a built-in one."""
    path = checkpoint_copy / SIDECAR_NAME
    data = json.loads(path.read_text())
    data["task"]["reward"] = "default"
    path.write_text(json.dumps(data))
    assert diagnose(checkpoint_copy).verdict != NO
    return checkpoint_copy


@pytest.mark.long
def test_every_field_of_the_record_has_a_range(ours: Path) -> None:
    path = ours / SIDECAR_NAME
    data = json.loads(path.read_text())
    names = list(fields(data))
    assert len(names) > 45 and {"witness.scores", "gradient_premise.made", "sampling.generation"} <= set(names)
    examined = 0
    for name in names:
        for value in HOSTILE:
            path.write_text(json.dumps(put(data, name, value)))
            try:
                read_sidecar(ours)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500, name
                continue
            if repr(value) in MEANINGFUL.get(name, ()):
                continue
            examined += 1
            found = diagnose(ours)
            assert found.verdict != YES, f"{name} = {value!r:.40} is taken"
            assert all("\n" not in line for line in found.remedies)
    assert examined < 40, "what the record's own ranges let through is little"


def test_what_is_said_to_mean_something_is_taken(ours: Path) -> None:
    """The list above holds nothing that is refused: a good record is never."""
    path = ours / SIDECAR_NAME
    data = json.loads(path.read_text())
    for name, meant in MEANINGFUL.items():
        for value in (v for v in HOSTILE if repr(v) in meant):
            path.write_text(json.dumps(put(data, name, value)))
            read_sidecar(ours)


@pytest.mark.parametrize("key", ["padding", "max_length", "truncation", "tokenizer_kwargs", "continue_final_message"])
def test_template_arguments_are_for_the_template_alone(ours: Path, key: str) -> None:
    path = ours / SIDECAR_NAME
    data = put(json.loads(path.read_text()), "sampling.chat_template_kwargs", {key: "max_length", "x": 10**9})
    path.write_text(json.dumps(data))
    found = diagnose(ours)
    assert found.verdict == NO and any(
        f"sets '{key}', which is not for the template" in line for line in found.remedies
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "setting", ["temperature", "top_p", "eos_token_id", "max_new_tokens", "do_sample", "watermarking_config"]
)
@every_kind
def test_settings_of_the_recorded_generator(ours: Path, setting: str, values: list[Any]) -> None:
    """Each value is the neutral one, or refused in a line."""
    path = ours / SIDECAR_NAME
    data = json.loads(path.read_text())
    neutral = {
        "do_sample": ("True", "1"),
        "eos_token_id": ("1", "True", "[True]"),
        "top_p": ("1", "True", "1e+308", str(10**30)),
        "temperature": ("1", "True"),
    }
    for value in values:
        if value != value or value == float("inf"):
            continue  # no JSON
        generation = {**data["sampling"]["generation"], setting: value}
        path.write_text(json.dumps(put(data, "sampling.generation", generation)))
        found = diagnose(ours)
        good = value is None or repr(value) in neutral.get(setting, ()) or value == [] and setting == "eos_token_id"
        good = good or value == [] and setting in ("temperature", "max_new_tokens")
        assert (found.verdict == NO) == (not good), f"{setting} = {value!r:.40}: {found.verdict}"
        assert all("\n" not in line for line in found.remedies)


@pytest.mark.long
@every_kind
def test_the_trainers_state_and_the_optimizers_groups(ours: Path, values: list[Any]) -> None:
    """Of a plain checkpoint: refused, or the rate is known to be unknown, and never a traceback."""
    (ours / SIDECAR_NAME).unlink()
    state = read_trainer_state(ours)
    optimizer = torch.load(ours / "optimizer.pt", weights_only=True)
    for value in values:
        rows = [{**row, "learning_rate": value} if "learning_rate" in row else row for row in state["log_history"]]
        for changed in ({"log_history": rows}, {"max_steps": value}, {"global_step": value}, {"log_history": value}):
            (ours / "trainer_state.json").write_text(json.dumps({**state, **changed}))
            found = examine_checkpoint(ours)
            rate = found.learning_rates[0] if found.learning_rates else 0.0
            assert 0 <= rate <= 10 and (
                found.problems or found.optimizer_problems or found.rate_problem or rate or value == 0
            ), changed
    (ours / "trainer_state.json").write_text(json.dumps(state))
    meant = {
        "lr": ("0", "1"), "eps": ("0", "1"), "weight_decay": ("0", "1"), "betas": (), "amsgrad": ("False",),
        "maximize": ("False",),
        "params": (), "initial_lr": tuple(map(repr, HOSTILE)), "foreach": tuple(map(repr, HOSTILE)),
    }  # fmt: skip
    for key, fine in meant.items():
        for value in values:
            groups = [{**group, key: value} for group in optimizer["param_groups"]]
            torch.save({**optimizer, "param_groups": groups}, ours / "optimizer.pt")
            found = examine_checkpoint(ours)
            assert all("\n" not in line for line in found.optimizer_problems)
            assert found.optimizer_problems or repr(value) in fine, f"{key} = {value!r:.40} is taken"
    torch.save([], ours / "scheduler.pt")
    torch.save(optimizer, ours / "optimizer.pt")
    assert "no state of a schedule" in examine_checkpoint(ours).optimizer_problems[0]


@pytest.mark.parametrize(
    ("eps", "zero", "kept", "fused", "words"),
    [
        (0.0, True, torch.float32, True, "is nothing in its precision"),
        (1e-60, True, torch.float32, False, "is nothing"),
        (0.0, False, torch.float32, False, None),
        (1e-8, True, torch.float16, False, "is nothing"),
        (1e-8, True, torch.float16, True, None),
        (1e-60, True, torch.float16, True, "is nothing"),
    ],
)
def test_an_eps_of_nothing_wants_second_moments(ours: Path, eps, zero, kept, fused, words) -> None:
    """torch's fused kernel adds eps in float32 to what it keeps in float16."""
    state = torch.load(ours / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group |= {"eps": eps, "fused": fused}
    for entry in state["state"].values():
        entry |= {name: entry[name].to(kept) for name in ("exp_avg", "exp_avg_sq")}
        entry["exp_avg_sq"].clamp_(min=1e-12 if kept == torch.float32 else 1e-7)
        if zero:
            entry["exp_avg_sq"].view(-1)[0] = entry["exp_avg"].view(-1)[0] = 0.0
    torch.save(state, ours / "optimizer.pt")
    reseal(ours)
    problems = examine_checkpoint(ours).optimizer_problems
    assert (not problems) if words is None else words in problems[0]


def test_tokens_beyond_the_vocabulary(ours: Path) -> None:
    path = ours / SIDECAR_NAME
    data = json.loads(path.read_text())
    for name, value in (("sampling.pad_token_id", 5000), ("sampling.eos_token_ids", [1, 5000])):
        path.write_text(json.dumps(put(data, name, value)))
        found = diagnose(ours)
        assert found.verdict == NO and "names the token 5000" in found.remedies[0]
    shutil.rmtree(ours)
