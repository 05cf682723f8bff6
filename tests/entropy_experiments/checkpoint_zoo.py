"""Checkpoints of every kind that people bring: made by real optimizers and PEFT, or as the files of other systems.

`build_zoo` fills a folder with one subfolder a kind; `ZOO` says of each what is true of it.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_experiments.checkpoints.optimizer_names import rebuild_parameter_names
from tests.entropy_experiments.checkpoint_edits import edit_json, edit_optimizer, flip_byte, reseal

RATE = 1e-3


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        lora_alpha=8, task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "up_proj"], **options}
    )


def adamw(groups: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0, **options)


def loraplus(model: Any) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0)


def trainer_groups(model: Any) -> list[dict[str, Any]]:
    """The Trainer's two groups: with weight decay, and without."""
    parameters = dict(model.named_parameters())
    return [{"params": [parameters[name] for name in names]} for names in rebuild_parameter_names(model)]


def plain_checkpoint(
    folder: Path,
    policy: Path,
    config: Any = None,
    make: Callable[[Any], torch.optim.Optimizer] | None = None,
    adapter_name: str = "default",
    added_tokens: int = 0,
    steps: int = 3,
    keep_embeddings: Any = "auto",
    schedule: Callable[[int], float] = lambda step: 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """What the Trainer leaves of a few steps of `make`'s optimizer on random tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    if added_tokens:
        tokenizer.add_tokens([f"<extra{k}>" for k in range(added_tokens)])
        model.resize_token_embeddings(len(tokenizer))
    if config is not None:
        model = peft.get_peft_model(model, config, adapter_name=adapter_name)
    optimizer = (make or (lambda m: adamw(trainer_groups(m))))(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule))  # as transformers makes its own
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(1, steps + 1):
        ids = torch.randint(3, 90, (4, 6), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        history.append({"step": step, "loss": 0.1, "learning_rate": optimizer.param_groups[0]["lr"]})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True)
    model.save_pretrained(folder, **({} if config is None else {"save_embedding_layers": keep_embeddings}))
    tokenizer.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    state = {"global_step": steps, "max_steps": 10, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@dataclass(frozen=True)
class Kind:
    """make: (folder, zoo) -> None. verdict: the doctor's. words: what its row must say."""

    make: Callable[[Path, "Zoo"], Any]
    verdict: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Zoo:
    """policy: a base model; ours: a checkpoint of this project's trainer."""

    policy: Path
    ours: Path

    def copy(self, folder: Path, reward: str = "default") -> Path:
        shutil.copytree(self.ours, folder)
        edit_json(folder / "entropy_experiments.json", lambda record: record["task"].update(reward=reward))
        return folder

    def without_sidecar(self, folder: Path) -> Path:
        self.copy(folder)
        (folder / "entropy_experiments.json").unlink()
        return folder

    def foreign(self, folder: Path, *names: str, weights: bool = False) -> Path:
        """A plain checkpoint with the files of another system in place of optimizer.pt."""
        plain_checkpoint(folder, self.policy, lora())
        (folder / "optimizer.pt").unlink()
        for name in () if weights else ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"shard")
        return folder


def eight_bit(state: dict[str, Any]) -> None:
    """As bitsandbytes saves its moments."""
    for entry in state["state"].values():
        shape = entry.pop("exp_avg").shape
        entry.pop("exp_avg_sq")
        entry.update({f"state{k}": torch.zeros(shape, dtype=torch.uint8) for k in (1, 2)})
        entry.update({f"{name}{k}": torch.zeros(256) for name in ("qmap", "absmax") for k in (1, 2)})


def whole_numbers(state: dict[str, Any]) -> None:
    for entry in state["state"].values():
        entry["exp_avg"] = (entry["exp_avg"] * 1e6).to(torch.int64)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(path, change)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def _quantised(folder: Path, zoo: Zoo) -> None:
    base = folder.parent.parent / "quantised_base"
    shutil.copytree(zoo.policy, base, dirs_exist_ok=True)
    edit(base / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    zoo.without_sidecar(folder)
    edit(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(base)))


def _no_tokenizer(folder: Path, zoo: Zoo) -> None:
    plain_checkpoint(folder, zoo.policy)
    for path in folder.glob("*token*"):
        path.unlink()


def _partial_adapter(folder: Path, zoo: Zoo) -> None:
    zoo.without_sidecar(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def _saved_model(folder: Path, zoo: Zoo) -> None:
    plain_checkpoint(folder, zoo.policy, lora())
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        (folder / name).unlink()


def _truncated(folder: Path, zoo: Zoo) -> None:
    path = zoo.without_sidecar(folder) / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:700])


def _remote_code(folder: Path, zoo: Zoo) -> None:
    plain_checkpoint(folder, zoo.policy)
    edit(folder / "config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Mine"}))
    (folder / "mine.py").write_text("raise SystemExit('code of the checkpoint was run')\n")


def _numbered_run(folder: Path, zoo: Zoo) -> None:
    zoo.copy(folder / "checkpoint-4")


def _other(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Path, Zoo], Any]:
    return lambda folder, zoo: plain_checkpoint(folder, zoo.policy, lora(), make)


def _adapter(config: Callable[[], Any]) -> Callable[[Path, Zoo], Any]:
    return lambda folder, zoo: plain_checkpoint(folder, zoo.policy, config())


def _configured(**values: Any) -> Callable[[Path, Zoo], Any]:
    return lambda folder, zoo: edit(zoo.without_sidecar(folder) / "adapter_config.json", lambda c: c.update(values))


def _recorded(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Zoo], Any]:
    return lambda folder, zoo: edit(zoo.copy(folder) / "entropy_experiments.json", change)


def _state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Zoo], Any]:
    return lambda folder, zoo: edit_optimizer(zoo.without_sidecar(folder), change)


def _all_groups(**values: Any) -> Callable[[Path, Zoo], Any]:
    return _state(lambda state: [group.update(values) for group in state["param_groups"]])


def _all_entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Zoo], Any]:
    return _state(lambda state: [change(entry) for entry in state["state"].values()])


def _pickled_weights(folder: Path, zoo: Zoo) -> None:
    plain_checkpoint(folder, zoo.policy)
    (folder / "model.safetensors").unlink()
    torch.save(Hostile(), folder / "pytorch_model.bin")


def _kernel(folder: Path, zoo: Zoo) -> None:
    plain_checkpoint(folder, zoo.policy)
    edit(folder / "config.json", lambda c: c.update(attn_implementation="someone/kernel"))


def _pipe(folder: Path, zoo: Zoo) -> None:
    path = zoo.without_sidecar(folder) / "optimizer.pt"
    path.unlink()
    os.mkfifo(path)


def _deep_record(folder: Path, zoo: Zoo) -> None:
    (zoo.copy(folder) / "entropy_experiments.json").write_text('{"format": 2, "a": ' + "[" * 10**5 + "]" * 10**5 + "}")


_O = torch.optim
ZOO: dict[str, Kind] = {
    "ours": Kind(lambda f, z: z.copy(f), "yes", ("this project", "nothing")),
    "own-reward": Kind(lambda f, z: z.copy(f, "somewhere:reward"), "no", ("somewhere:reward", "--trust")),
    "ours-run": Kind(_numbered_run, "yes", ("this project",)),
    "plain": Kind(lambda f, z: z.without_sidecar(f), "yes", ("plain TRL", "checkpoint.task")),
    "plain-whole": Kind(lambda f, z: plain_checkpoint(f, z.policy), "yes", ("whole model",)),
    "lora-plus": Kind(_other(loraplus), "yes", ("LoRA",)),
    "named-adapter": Kind(
        lambda f, z: plain_checkpoint(f, z.policy, lora(), adapter_name="policy"), "yes", ("named policy",)
    ),
    "resized": Kind(lambda f, z: plain_checkpoint(f, z.policy, lora(), added_tokens=5), "yes", ("LoRA",)),
    "resized-whole": Kind(lambda f, z: plain_checkpoint(f, z.policy, added_tokens=5), "yes", ("whole",)),
    "resized-rows-lost": Kind(
        lambda f, z: plain_checkpoint(f, z.policy, lora(), added_tokens=5, keep_embeddings=False),
        "no", ("rows that were added", "checkpoint.model"),
    ),
    "amsgrad": Kind(_other(lambda m: adamw(trainer_groups(m), amsgrad=True)), "yes", ()),
    "adam-no-decay": Kind(_other(lambda m: _O.Adam(trainer_groups(m), lr=RATE)), "yes", ()),
    "saved-model": Kind(_saved_model, "without Adam", ("saved model", "checkpoint.learning_rate")),
    "save-only-model": Kind(lambda f, z: (z.without_sidecar(f) / "optimizer.pt").unlink(), "without Adam", ("save_only_model",)),
    "ours-optimizer-lost": Kind(lambda f, z: (z.copy(f) / "optimizer.pt").unlink(), "without Adam", ("it was saved",)),
    "no-trainer-state": Kind(lambda f, z: (z.without_sidecar(f) / "trainer_state.json").unlink(), "no", ("trainer_state.json",)),
    "no-tokenizer": Kind(_no_tokenizer, "no", ("no tokenizer",)),
    "sgd": Kind(_other(lambda m: _O.SGD(trainer_groups(m), lr=RATE)), "without Adam", ("SGD",)),
    "sgd-momentum": Kind(_other(lambda m: _O.SGD(trainer_groups(m), lr=RATE, momentum=0.9)), "without Adam", ("SGD",)),
    "radam": Kind(_other(lambda m: _O.RAdam(trainer_groups(m), lr=RATE)), "without Adam", ("RAdam",)),
    "nadam": Kind(_other(lambda m: _O.NAdam(trainer_groups(m), lr=RATE)), "without Adam", ("NAdam",)),
    "rmsprop": Kind(_other(lambda m: _O.RMSprop(trainer_groups(m), lr=RATE)), "without Adam", ("RMSprop",)),
    "adafactor": Kind(_other(lambda m: _O.Adafactor(trainer_groups(m), lr=RATE)), "without Adam", ("Adafactor",)),
    "coupled-decay": Kind(
        _other(lambda m: _O.Adam(trainer_groups(m), lr=RATE, weight_decay=0.1)), "without Adam", ("couples weight decay",)
    ),
    "maximize": Kind(_other(lambda m: adamw(trainer_groups(m), maximize=True)), "without Adam", ("maximize",)),
    "eight-bit": Kind(_state(eight_bit), "without Adam", ("bitsandbytes",)),
    "int-moments": Kind(_state(whole_numbers), "without Adam", ("int64",)),
    "byte-moments": Kind(
        _all_entries(lambda e: e.update(exp_avg_sq=e["exp_avg_sq"].to(torch.uint8))), "without Adam", ("8-bit",)
    ),
    "cautious": Kind(_all_groups(cautious=True), "without Adam", ("cautious",)),
    "extra-state": Kind(_all_entries(lambda e: e.update(grok_ema=e["exp_avg"])), "without Adam", ("GrokAdamW",)),
    "unknown-state": Kind(_all_entries(lambda e: e.update(sharpness=e["exp_avg"])), "without Adam", ("sharpness",)),
    "wrong-step": Kind(_all_entries(lambda e: e["step"].fill_(7)), "without Adam", ("7 steps",)),
    "swapped-moments": Kind(
        _all_entries(lambda e: e.update(exp_avg=e["exp_avg"] * 1e3)), "without Adam", ("larger than exp_avg_sq allows",)
    ),
    "nan-moments": Kind(_all_entries(lambda e: e["exp_avg_sq"].fill_(float("nan"))), "without Adam", ("exp_avg_sq holds NaN",)),
    "truncated": Kind(_truncated, "without Adam", ("damaged",)),
    "hostile": Kind(
        lambda f, z: torch.save({"state": Hostile()}, z.without_sidecar(f) / "optimizer.pt"), "without Adam", ("exec",)
    ),
    "flipped-adapter": Kind(lambda f, z: flip_byte(z.copy(f) / "adapter_model.safetensors"), "no", ("SHA-256",)),
    "flipped-optimizer": Kind(lambda f, z: flip_byte(z.copy(f) / "optimizer.pt"), "without Adam", ("SHA-256",)),
    "partial-adapter": Kind(_partial_adapter, "no", ("partial",)),
    "missing-base": Kind(_configured(base_model_name_or_path="/no/where"), "no", ("base model", "checkpoint.model")),
    "quantised-base": Kind(_quantised, "no", ("gptq", "dequantize")),
    "dora": Kind(_adapter(lambda: lora(use_dora=True)), "yes", ("DoRA",)),
    "ia3": Kind(
        _adapter(lambda: peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"], task_type="CAUSAL_LM")),
        "yes", ("IA3",),
    ),
    "prompt-tuning": Kind(
        _adapter(lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")), "no", ("PROMPT_TUNING",)
    ),
    "new-option": Kind(_configured(use_newest=True), "no", ("use_newest",)),
    "imports-modules": Kind(_configured(megatron_config={"a": 1}, megatron_core="x"), "no", ("megatron_config",)),
    "random-start": Kind(_configured(init_lora_weights="pissa_niter_4"), "no", ("pissa_niter_4",)),
    "boft": Kind(
        _adapter(lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), "yes", ("BOFT",)
    ),
    "shira": Kind(
        _adapter(lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")), "yes", ("SHIRA",)
    ),
    "lora-on-head": Kind(_adapter(lambda: lora(target_modules=["lm_head", "q_proj"])), "yes", ("LoRA",)),
    "lora-on-embeddings": Kind(_adapter(lambda: lora(target_modules=["embed_tokens", "q_proj"])), "yes", ("LoRA",)),
    "bad-pattern": Kind(_configured(target_modules="((("), "no", ("unterminated",)),
    "endless-pattern": Kind(_configured(target_modules="([a-z_.0-9]+)+$%"), "no", ("as a list of names",)),
    "odd-config": Kind(
        lambda f, z: (z.without_sidecar(f) / "adapter_config.json").write_text('"x"'), "no", ("names no base model",)
    ),
    "nested-ids": Kind(
        _state(lambda s: s["param_groups"][0]["params"].__setitem__(1, [1])), "without Adam", ("not an optimizer state of torch",)
    ),
    "odd-flag": Kind(_all_groups(maximize=torch.tensor([1, 2])), "without Adam", ("neither true nor false",)),
    "no-values": Kind(_all_entries(lambda e: e.update(exp_avg=e["exp_avg"].to("meta"))), "without Adam", ("no plain tensor",)),
    "pickled-weights": Kind(_pickled_weights, "no", ("Weights only load failed",)),
    "kernel": Kind(_kernel, "no", ("someone/kernel", "never run")),
    "pipe": Kind(_pipe, "no", ("a pipe or a device",)),
    "deep-record": Kind(_deep_record, "no", ("cannot be read",)),
    "long-name": Kind(_recorded(lambda c: c["sha256"].update({"a" * 5000: "0" * 64})), "no", ("tampered",)),
    "odd-dtype": Kind(_recorded(lambda c: c.update(dtype="int8")), "no", ("dtype should be",)),
    "no-prompts": Kind(_recorded(lambda c: c["sampling"].update(prompts_per_step=-3)), "no", ("prompts_per_step",)),
    "unknown-data-set": Kind(_recorded(lambda c: c["task"].update(name="no_such_set")), "no", ("no_such_set",)),
    "odd-arguments": Kind(_recorded(lambda c: c["task"].update(arguments={"no_such": 1})), "no", ("no_such",)),
    "damaged-witness": Kind(_recorded(lambda c: c["witness"]["scores"].pop()), "no", ("compares by are damaged",)),
    "odd-task": Kind(_recorded(lambda c: c["task"].update(zzz=1)), "no", ("zzz",)),
    "remote-code": Kind(_remote_code, "no", ("auto_map",)),
    "unknown-format": Kind(_recorded(lambda c: c.update(format=9)), "no", ("format 9",)),
    "top-p": Kind(_recorded(lambda c: c["sampling"].update(top_p=0.9)), "no", ("top_p",)),
    "mixed-steps": Kind(
        lambda f, z: edit(z.copy(f) / "trainer_state.json", lambda c: c.update(global_step=2)), "no", ("two checkpoints",)
    ),
    "fsdp-full": Kind(lambda f, z: z.foreign(f, "optimizer.bin", weights=True), "without Adam", ("FSDP",)),
    "fsdp-sharded": Kind(
        lambda f, z: z.foreign(f, "optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata"), "no", ("FSDP", "import")
    ),
    "deepspeed": Kind(
        lambda f, z: z.foreign(f, "latest", "zero_to_fp32.py", "global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "no", ("DeepSpeed",),
    ),
    "deepspeed-weights": Kind(
        lambda f, z: z.foreign(f, "latest", "global_step3/x_optim_states.pt", weights=True), "without Adam", ("DeepSpeed",)
    ),
    "dcp": Kind(lambda f, z: z.foreign(f, ".metadata", "__0_0.distcp"), "no", ("distcp",)),
    "verl": Kind(lambda f, z: _files(f, "actor/model_world_size_2_rank_0.pt"), "no", ("verl",)),
    "verl-actor": Kind(lambda f, z: _files(f, "model_world_size_2_rank_0.pt", "optim_world_size_2_rank_0.pt"), "no", ("verl",)),
}  # fmt: skip


def _files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"shard")


def build_zoo(root: Path, zoo: Zoo) -> Path:
    """One folder a kind, under `root`/zoo."""
    folder = root / "zoo"
    for name, kind in ZOO.items():
        kind.make(folder / name, zoo)
    return folder


__all__ = ["RATE", "ZOO", "Kind", "Zoo", "build_zoo", "lora", "plain_checkpoint", "reseal"]
