"""Loading checkpoints: ours and plain TRL's, with moments by name; every kind of damage is one clear line."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from entropy_core.adamw import read_adamw_state
from entropy_core.gradients import trainable_parameters
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.checkpoints.optimizer_names import mapping_evidence, rebuild_parameter_names
from rl_training.errors import UserError
from rl_training.train import build_trainer
from tests.entropy_experiments.checkpoint_edits import reseal
from tests.tiny_policy import save_tiny_policy, tiny_train_config


def test_every_moment_lands_on_its_parameter(tiny_run):
    checkpoint = load_checkpoint(tiny_run)
    assert checkpoint.record.step == 4 and checkpoint.record.path.name == "checkpoint-4"
    parameters = trainable_parameters(checkpoint.model)
    state = read_adamw_state(checkpoint.optimizer, parameters)
    stored = torch.load(tiny_run / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    names = [name for group in checkpoint.record.sidecar.optimizer_parameter_names for name in group]
    assert state.keys() == parameters.keys() == set(names)
    for number, name in enumerate(names):
        assert torch.equal(state[name].exp_avg_sq, stored[number]["exp_avg_sq"])
        assert state[name].step == 4 and state[name].lr == pytest.approx(1e-3)
    weights = load_file(tiny_run / "checkpoint-4" / "adapter_model.safetensors")
    for name, p in parameters.items():
        assert torch.equal(p, weights[name.replace(".default", "")])


def test_fully_trained_models_keep_the_order_of_their_two_groups(tmp_path):
    """Biases and norms come second in optimizer.pt, tied weights once: the rebuilt order is the trainer's own."""
    config = tiny_train_config(
        save_tiny_policy(tmp_path / "policy"),
        tmp_path / "run",
        lora={"enabled": False},
        training={"steps": 1, "save_every": 1},
        entropy_probe={"enabled": False},
    )
    trainer, _ = build_trainer(config)
    trainer.train()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-1")
    names = rebuild_parameter_names(checkpoint.model)
    assert names == checkpoint.record.sidecar.optimizer_parameter_names
    assert all("norm" in name for name in names[1]) and len(names[1]) == 5
    assert sum(map(len, names)) == len(trainable_parameters(checkpoint.model))


def test_a_checkpoint_of_plain_trl_loads_without_a_sidecar(checkpoint_copy):
    (checkpoint_copy / "entropy_experiments.json").unlink()
    ours = load_checkpoint(checkpoint_copy, require_optimizer=True)
    assert ours.record.sidecar is None
    state = read_adamw_state(ours.optimizer, trainable_parameters(ours.model))
    assert {s.step for s in state.values()} == {4}
    assert {s.lr for s in state.values()} == {1e-3}, "the rate is the logged one, not the next step's"


def test_a_shuffled_sidecar_is_refused(checkpoint_copy):
    path = checkpoint_copy / "entropy_experiments.json"
    content = json.loads(path.read_text())
    first = content["optimizer_parameter_names"][0]
    # two neighbours of one shape: no shape check can see it
    shapes = {n: p.shape for n, p in load_checkpoint(checkpoint_copy).model.named_parameters()}
    i, j = next((a, b) for a in range(len(first)) for b in range(a) if shapes[first[a]] == shapes[first[b]])
    first[i], first[j] = first[j], first[i]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="nothing is analysed"):
        load_checkpoint(checkpoint_copy)


def test_entries_swapped_across_shapes_are_refused(checkpoint_copy):
    path = checkpoint_copy / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    a = 0
    b = next(k for k in state["state"] if state["state"][k]["exp_avg"].shape != state["state"][a]["exp_avg"].shape)
    state["state"][a], state["state"][b] = state["state"][b], state["state"][a]
    torch.save(state, path)
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="another order"):
        load_checkpoint(checkpoint_copy)


def test_gradients_recognise_their_own_moments_and_not_shuffled_ones(tiny_run):
    """The evidence that `analyze` asks for: high for the true mapping, low once same-shaped entries are permuted."""
    from entropy_core.batch import SequenceBatch
    from entropy_core.entropy import score_coefficients
    from entropy_core.gradients import batch_gradients
    from rl_training.run.rollouts import read_rollouts

    checkpoint = load_checkpoint(tiny_run)
    parameters = trainable_parameters(checkpoint.model)
    rows = [r for step in (3, 4) for r in read_rollouts(tiny_run, step) if r.status == "trained"]
    batch = SequenceBatch.from_sequences(
        [r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prompt_index for r in rows], 0
    )
    weights = torch.tensor([r.weight for r in rows])
    gradient = batch_gradients(checkpoint.model, batch, [score_coefficients(batch, -weights)])[0]
    state = read_adamw_state(checkpoint.optimizer, parameters)
    true = mapping_evidence(state, gradient)
    assert true.convincing("none") and true.share > 0.7, true
    shuffled = dict(state)
    by_shape: dict = {}
    for name, p in parameters.items():
        by_shape.setdefault(p.shape, []).append(name)
    rng = random.Random(0)
    for names in by_shape.values():
        order = names[1:] + names[:1] if len(names) < 4 else rng.sample(names, len(names))
        shuffled.update({name: state[other] for name, other in zip(names, order, strict=True)})
    wrong = mapping_evidence(shuffled, gradient)
    assert not wrong.convincing("none") and not wrong.convincing("names"), wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "partial"),
        ("trainer_state.json", "partial"),
        ("optimizer.pt", "it was saved, and is gone.*preconditioning=none"),
    ],
)
def test_each_missing_part_is_named_with_its_remedy(checkpoint_copy, name, message):
    (checkpoint_copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        load_checkpoint(checkpoint_copy)


def test_only_where_nothing_says_otherwise_save_only_model_is_guessed(checkpoint_copy):
    (checkpoint_copy / "optimizer.pt").unlink()
    (checkpoint_copy / "entropy_experiments.json").unlink()
    with pytest.raises(UserError, match=r"optimizer\.pt.*save_only_model"):
        load_checkpoint(checkpoint_copy)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a checkpoint"):
        load_checkpoint(tmp_path)


def test_a_truncated_optimizer_file_is_damaged_not_absent(checkpoint_copy):
    path = checkpoint_copy / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(checkpoint_copy)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('pickle was run')",))


def test_a_pickle_is_never_run(checkpoint_copy):
    torch.save({"state": {}, "param_groups": [], "x": Hostile()}, checkpoint_copy / "optimizer.pt")
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="cannot be read as plain tensors.*exec"):
        load_checkpoint(checkpoint_copy)


def test_another_optimizers_state_is_refused(checkpoint_copy):
    path = checkpoint_copy / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry.pop("exp_avg")
    torch.save(state, path)
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="not the state of Adam"):
        load_checkpoint(checkpoint_copy)


def test_an_adapter_whose_base_model_is_gone(checkpoint_copy):
    path = checkpoint_copy / "entropy_experiments.json"
    content = json.loads(path.read_text())
    content["model_name"] = "/nowhere/policy"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"base model.*checkpoint\.model="):
        load_checkpoint(checkpoint_copy)


def test_weights_that_diverged(checkpoint_copy):
    path = checkpoint_copy / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name][0, 0] = float("nan")
    save_file(weights, path)
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="NaN"):
        load_checkpoint(checkpoint_copy)


def test_a_truncating_sampler_is_refused(checkpoint_copy):
    from entropy_experiments.buffers.sampling_plan import plan_sampling
    from entropy_experiments.config import FisherAnalysisConfig

    path = checkpoint_copy / "entropy_experiments.json"
    content = json.loads(path.read_text())
    content["sampling"]["top_p"] = 0.9
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"top_p=0\.9"):
        plan_sampling(load_checkpoint(checkpoint_copy), FisherAnalysisConfig())
