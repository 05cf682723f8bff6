"""`import` makes a run of ours out of every layout, and an analysis of it says what one of the Trainer's checkpoint says."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from entropy_core.adamw import read_adamw_state
from entropy_core.gradients import trainable_parameters
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.checkpoints.imported import IMPORT_RECORD, MOMENTS_FILE, read_import_record
from entropy_experiments.checkpoints.validation import examine_checkpoint
from entropy_experiments.console.describe_source import describe, importable
from entropy_experiments.console.doctor import examine, examine_all
from entropy_experiments.console.import_source import import_lines, import_run
from entropy_experiments.entropy_runner import run_fisher_analysis
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.stored.write_zero import HERE
from tests.entropy_experiments.small_analysis import config
from tests.warm_python import warm_run

FORMATS = [
    written.VERL, written.PRIME, written.TITAN, written.OPENRLHF, written.FULL, written.SHARDED, written.RANKED, written.TRAINER,
    written.NEMO, written.VEOMNI, written.STATE, "zero1/checkpoint-4", "zero2/checkpoint-4", "zero3/checkpoint-4",
]  # fmt: skip
TASK = "{name: chain_sum, arguments: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}, size: 24, heldout_size: 16}"
TOLD = (
    f"checkpoint.task={TASK}", "entropy_analysis.sampling.temperature=1.0", "checkpoint.learning_rate=1e-3",
    "entropy_analysis.sampling.max_completion_length=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(formats, tmp_path_factory):
    """format -> the run that was imported from it."""
    root = tmp_path_factory.mktemp("imported")
    made = {name: root / name.split("/")[0] for name in FORMATS}
    for name, run in made.items():
        import_run(formats / name, run, str(formats / "policy"))
    return made


def moments_of(checkpoint) -> list[torch.Tensor]:
    """exp_avg and exp_avg_sq of every trained parameter, in the model's order."""
    trained = trainable_parameters(checkpoint.model)
    stored = checkpoint.optimizer
    state = stored if isinstance(stored, Mapping) else read_adamw_state(stored, trained)
    return [m for name in trained for m in (state[name].exp_avg, state[name].exp_avg_sq)]


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_an_imported_checkpoint_loads_with_its_moments(runs, reference, name):
    with pytest.warns(UserWarning, match="not verified"):
        checkpoint = load_checkpoint(runs[name], device="cpu", learning_rate=1e-3)
    assert checkpoint.record.step == 4 and checkpoint.record.imported is not None
    weights = dict(checkpoint.model.named_parameters())
    found = dict(zip((f"{name}/{kind}" for name in weights for kind in "mv"), moments_of(checkpoint), strict=True))
    for key, moments in reference["moments"].items():
        assert torch.equal(weights[key].detach(), reference["weights"][key]), key
        assert torch.equal(found[f"{key}/m"], moments["exp_avg"]) and torch.equal(
            found[f"{key}/v"], moments["exp_avg_sq"]
        )
    assert checkpoint.record.learning_rates == (1e-3, 1e-3)


def numbers(value, path="") -> dict[str, float]:
    """Every number of a summary by its place."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}/{i}").items()}
    return {path: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


ANALYSED = [written.VERL, written.PRIME, "zero2/checkpoint-4"]
_ALL = [name for name in FORMATS if name not in (*ANALYSED, written.TRAINER)]


@pytest.fixture(scope="module")
def summary_of(tmp_path_factory):
    done: dict[Path, dict] = {}

    def summary(checkpoint: Path) -> dict:
        if checkpoint not in done:
            folder = tmp_path_factory.mktemp("analysis")
            analysis = run_fisher_analysis(checkpoint, config(*TOLD, f"output_dir={folder}"))
            done[checkpoint] = json.loads((analysis.folder / "summary.json").read_text())
        return done[checkpoint]

    return summary


def assert_same(found: dict, wanted: dict) -> None:
    """Every number but those of time and memory."""
    numbers_found, numbers_wanted = numbers(found), numbers(wanted)
    skipped = ("seconds", "memory", "bytes", "/timing", "date", "time")
    compared = {k for k in numbers_wanted if not any(word in k for word in skipped)}
    assert len(compared) > 100 and compared <= numbers_found.keys()
    for key in compared:
        pair = numbers_found[key], numbers_wanted[key]
        assert math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-9), (key, *pair)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ANALYSED, *(pytest.param(n, marks=pytest.mark.long) for n in _ALL)])
def test_one_policy_in_every_format_gives_the_same_summary(formats, runs, summary_of, name):
    assert_same(summary_of(runs[name] / "checkpoint-4"), summary_of(formats / written.TRAINER))


def one_group(run: Path, like: Path) -> Path:
    """The run imported from FSDP2 with its parameters in one group, as the flat vectors of FSDP1 have to be."""
    records = [json.loads((folder / IMPORT_RECORD).read_text()) for folder in (run / "checkpoint-4", like)]
    (run / "checkpoint-4" / IMPORT_RECORD).write_text(json.dumps({**records[0], "groups": records[1]["groups"]}))
    return run / "checkpoint-4"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["FSDP1", "adapter", "8 bits"])
def test_and_so_do_formats_of_other_moments(formats, summary_of, tmp_path, kind):
    """FSDP1's flat vectors (one group), an adapter's by verl and by accelerate, 8 bits in place and imported."""
    if kind == "8 bits":
        pair = [eight_bit_copy(formats, tmp_path / "checkpoint-4")[0]]
        pair += [import_run(pair[0], tmp_path / "run")[0].folder]
    elif kind == "adapter":
        sources = (written.VERL_LORA, written.LORA)
        pair = [import_run(formats / s, tmp_path / s, str(formats / "policy"))[0].folder for s in sources]
    else:
        pair = [import_run(formats / written.FSDP1_SAME, tmp_path / "flat")[0].folder]
        import_run(formats / written.VERL, tmp_path / "cut")
        pair += [one_group(tmp_path / "cut", pair[0])]
    assert_same(*(summary_of(path) for path in pair))


def test_the_record_says_where_each_thing_came_from(formats, runs):
    record = read_import_record(runs[written.VERL] / "checkpoint-4")
    assert record is not None and record.layout == "verl or SkyRL, FSDP2, 2 processes"
    assert record.source == str(formats / written.VERL) and record.named_by == "order"
    assert record.origins["config.json"].endswith("huggingface/config.json")
    assert record.origins[MOMENTS_FILE].endswith("optim_world_size_2_rank_*.pt")
    assert record.sha256.keys() == {"model.safetensors", MOMENTS_FILE}
    assert set(record.steps.values()) == {4} and len(record.steps) == 20
    assert read_import_record(runs[written.PRIME] / "checkpoint-4").named_by == "files"


def test_saved_weights_are_linked_not_copied(formats, runs):
    here, there = runs[written.TRAINER] / "checkpoint-4", formats / written.TRAINER
    assert os.path.samefile(here / "model.safetensors", there / "model.safetensors")


def test_a_linked_file_that_was_written_anew_is_refused(formats, copied, tmp_path):
    source = copied(written.TRAINER)
    import_run(source, tmp_path / "run")
    here = tmp_path / "run" / "checkpoint-4"
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert "is not the file that was imported" in examine_checkpoint(here).problems[0]


def test_weights_that_are_not_the_moments_are_refused(formats, copied, tmp_path):
    """Saved weights beside the shards, two of them under each other's names."""
    source = copied(written.SHARDED)
    a, b = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    with safe_open(formats / written.TRAINER / "model.safetensors", framework="pt") as file:
        saved = {{a: b, b: a}.get(key, key): file.get_tensor(key) for key in file.keys()}
    save_file(saved, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{a}' is not the weight that .* names were changed"):
        import_run(source, tmp_path / "run", str(formats / "policy"))
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.fixture
def adapter_run(tiny_run, tmp_path):
    """The run imported from a checkpoint of an adapter, as plain TRL leaves it; it was trained by policy gradients."""
    source = Path(shutil.copytree(tiny_run / "checkpoint-4", tmp_path / "trl" / "checkpoint-4"))
    (source / "entropy_experiments.json").unlink()
    return import_run(source, tmp_path / "run")[0].folder


@pytest.mark.filterwarnings("ignore")
def test_an_imported_adapter_is_what_it_was(tiny_run, adapter_run):
    before, after = (load_checkpoint(path, device="cpu") for path in (tiny_run / "checkpoint-4", adapter_run))
    found = dict(after.model.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in before.model.named_parameters())
    assert before.record.learning_rates == after.record.learning_rates
    for one, other in zip(moments_of(before), moments_of(after), strict=True):
        assert torch.equal(one, other)
    assert read_import_record(adapter_run).layout == "HF Trainer"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [written.VERL_LORA, written.LORA])
def test_an_adapter_under_fsdp_is_imported(formats, tmp_path, name):
    """verl hands frozen parameters to the optimizer too, and numbers them; accelerate saves the adapter's shards alone."""
    made = import_run(formats / name, tmp_path / "run", str(formats / "policy"))[0]
    assert made.moments == 8 and sum(len(group.names) for group in made.record.groups) == 8
    loaded = load_checkpoint(made.folder, device="cpu", learning_rate=1e-3)
    expected, trained = torch.load(formats / "reference_lora.pt"), trainable_parameters(loaded.model)
    assert len(trained) == 8 and all("lora_" in key for key in trained)
    for key, (m, v) in zip(trained, zip(*[iter(moments_of(loaded))] * 2, strict=True), strict=True):
        assert torch.equal(trained[key], expected["weights"][key]), key
        assert torch.equal(m, expected["moments"][key]["exp_avg"]), key
        assert torch.equal(v, expected["moments"][key]["exp_avg_sq"]), key


@pytest.mark.parametrize("name", [written.VERL_LORA, written.LORA])
def test_the_base_model_that_is_named_is_remembered(formats, copied, tmp_path, name):
    """Where the adapter was trained its base model lay elsewhere; an analysis finds what `--model` named."""
    source = copied(name)
    for path in source.rglob("adapter_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/another/machine/base"}))
    made = import_run(source, tmp_path / "run", str(formats / "policy"))[0]
    base = json.loads((made.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((formats / "policy").resolve())
    assert made.record.origins["adapter_config.json"].endswith("adapter_config.json, its base model by --model")


@pytest.mark.filterwarnings("ignore")
def test_names_that_changed_places_are_refused_by_gradients(adapter_run, tmp_path):
    """Moments of all matrices of one shape, each under another's name: shapes fit, gradients do not."""
    with safe_open(adapter_run / MOMENTS_FILE, framework="pt") as file:
        moments = {key: file.get_tensor(key) for key in file.keys()}
    by_shape: dict[tuple, list[str]] = {}
    for key in moments:
        by_shape.setdefault((key.split("/")[0], *moments[key].shape), []).append(key)
    shuffled = {k: moments[v] for own in by_shape.values() for k, v in zip(own, own[1:] + own[:1], strict=True)}
    save_file({key: shuffled[key].clone() for key in moments}, adapter_run / MOMENTS_FILE)
    record = json.loads((adapter_run / IMPORT_RECORD).read_text())
    (adapter_run / IMPORT_RECORD).write_text(json.dumps({**record, "sha256": {}}))
    with pytest.raises(UserError, match="in another order|changed places"):
        run_fisher_analysis(adapter_run, config(*TOLD, f"output_dir={tmp_path}"))


def test_a_saved_model_has_no_adam(formats, tmp_path):
    made = import_run(formats / "policy", tmp_path / "run")
    assert "no moments: analyse with preconditioning=none" in import_lines(made)[0]
    checkpoint = made[0].folder
    assert load_checkpoint(checkpoint, device="cpu", require_optimizer=False).optimizer is None
    with pytest.raises(UserError, match="the checkpoint that was imported held none"):
        load_checkpoint(checkpoint, device="cpu")


def test_a_run_of_ours_is_not_imported(tiny_run, runs, tmp_path):
    for ours in (tiny_run, runs[written.PRIME]):
        with pytest.raises(UserError, match="is a checkpoint of this project: analyse it as it is"):
            import_run(ours, tmp_path / "run")


def test_an_import_is_whole_or_absent_and_overwrites_nothing(formats, runs, tmp_path):
    with pytest.raises(UserError, match="exists already: nothing is overwritten"):
        import_run(formats / written.VERL, runs[written.VERL])
    broken = Path(shutil.copytree(formats / written.VERL, tmp_path / "broken"))
    (broken / "actor" / "huggingface" / "config.json").write_text("{")
    with pytest.raises(UserError):
        import_run(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_doctor_says_what_a_source_is_and_what_an_import_is(formats, runs):
    found = describe(formats / written.VERL)
    text = "\n".join(found.lines)
    assert found.healthy and "moments of 20 parameters at step 4" in text
    assert "can be imported: entropy-experiments import" in text
    found = describe(formats / written.PRIME)
    assert not found.healthy and "MISSING config.json and a tokenizer: give --model" in "\n".join(found.lines)
    assert importable(formats / written.SHARDED) and not importable(formats / written.TRAINER)
    lines, _ = examine(runs[written.VERL])
    assert "imported from verl or SkyRL, FSDP2, 2 processes" in lines[1] and "can be analysed" in lines[-1]


def test_doctor_finds_the_checkpoints_of_a_run_and_tells_of_a_folder_of_many(formats):
    """A run is described by its last checkpoint, wherever the trainer put it; in a table each row says how to go on."""
    for name in (written.PRIME, written.OPENRLHF, written.NEMO, written.RANKED, written.LORA, written.TITAN):
        run = formats / name.split("/")[0]
        lines, _ = examine_all(run)
        assert lines[0] == f"checkpoint {formats / name}"
        assert f"can be imported: entropy-experiments import {run} --output RUN" in lines[-1]
        with pytest.raises(UserError, match="entropy-experiments import .* --output RUN"):
            load_checkpoint(run)
    lines, healthy = examine_all(formats)
    rows = {line.split()[0]: line for line in lines[1:]}
    for name in ("full", "lora", "ranked", "sharded", "prime", "openrlhf", "nemo", "titan", "verl", "verl_lora"):
        assert (
            "  after import  " in rows[name] and f"entropy-experiments import {formats / name} --output" in rows[name]
        ), name
    assert "  yes  " in rows["trainer"] and not healthy


@pytest.mark.long
def test_the_commands(formats, tmp_path):
    said = warm_run("-m", "entropy_experiments", "doctor", formats / written.VERL)
    assert said.returncode == 0 and "can be imported" in said.stdout
    done = warm_run("-m", "entropy_experiments", "import", formats / written.VERL, "--output", tmp_path / "run")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "run"), done.stderr
    refused = warm_run("-m", "entropy_experiments", "analyze", formats / written.VERL)
    assert refused.returncode == 2 or "entropy-experiments import" in refused.stderr


def in_eight_bits(values: torch.Tensor, qmap: torch.Tensor) -> dict[str, torch.Tensor]:
    """Blocks of 256 elements, each by its largest magnitude, to the nearest value of the map."""
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 256)).reshape(-1, 256)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax[:, None].clamp(min=1e-30)).flatten()[: len(flat)]
    state = (scaled[:, None] - qmap).abs().argmin(1).to(torch.uint8)
    return {"state": state.reshape(values.shape), "qmap": qmap, "absmax": absmax}


def eight_bit_copy(formats: Path, folder: Path) -> tuple[Path, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """The Trainer's checkpoint with its matrices' moments as bitsandbytes stores them (maps of its own), and what they are."""
    shutil.copytree(formats / written.TRAINER, folder)
    maps = torch.load(HERE / "adamw_8bit.pt")["state"][0]["__bnb_optimizer_quant_state__"]
    content = torch.load(folder / "optimizer.pt")
    expected = {}
    for number, entry in content["state"].items():
        moments = entry["exp_avg"], entry["exp_avg_sq"]
        parts: dict[str, torch.Tensor] = {"state1": moments[0], "state2": moments[1]}
        if moments[0].dim() == 2:
            small = {k: in_eight_bits(m, maps[f"qmap{k}"]) for k, m in zip("12", moments, strict=True)}
            parts = {f"{name}{k}": value for k, own in small.items() for name, value in own.items()}
            moments = tuple(
                (
                    own["qmap"][own["state"].long().flatten()] * own["absmax"].repeat_interleave(256)[: m.numel()]
                ).reshape(m.shape)
                for own, m in zip(small.values(), moments, strict=True)
            )
        expected[number] = moments
        content["state"][number] = {"step": 4, "__bnb_optimizer_quant_state__": parts}
    unused = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    for group in content["param_groups"]:
        kept = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "initial_lr", "params")}
        group.clear()
        group.update(kept, **unused)
    torch.save(content, folder / "optimizer.pt")
    return folder, expected


@pytest.mark.filterwarnings("ignore")
def test_eight_bit_moments_of_the_trainer_are_analysed_as_they_are(formats, tmp_path):
    checkpoint, expected = eight_bit_copy(formats, tmp_path / "checkpoint-4")
    found = examine_checkpoint(checkpoint)
    assert not found.problems + found.optimizer_problems and any(
        "of the second moments are 0" in n for n in found.notes
    )
    made = import_run(checkpoint, tmp_path / "run")
    assert made[0].record.quantised and any("8 bits" in note for note in made[0].record.notes)
    numbers = {name: n for n, name in enumerate(name for group in found.names for name in group)}
    for path in (checkpoint, made[0].folder):
        loaded = load_checkpoint(path, device="cpu")
        names = list(trainable_parameters(loaded.model))
        for name, (m, v) in zip(names, zip(*[iter(moments_of(loaded))] * 2, strict=True), strict=True):
            wanted = expected[numbers[name]]
            assert torch.equal(m, wanted[0]) and torch.equal(v, wanted[1]), name
