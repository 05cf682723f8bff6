"""Two gloo processes train the tiny policy under FSDP and save it as verl, prime-rl, torchtitan, OpenRLHF and accelerate do.

The real libraries write: torch's FSDP, DCP and torch.save, accelerate's save_fsdp_model and save_fsdp_optimizer.
"""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model, save_fsdp_optimizer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

STEPS = 4
FOLDER = "FORMATS_FOLDER"
"""Environment variable: where the policy lies and the formats go."""

VERL, PRIME, TITAN, OPENRLHF = (
    "verl/global_step_4",
    "prime/checkpoints/step_4",
    "titan/step-4",
    "openrlhf/global_step_4",
)
FULL, SHARDED, RANKED, FSDP1 = "full/checkpoint-4", "sharded/checkpoint-4", "ranked/checkpoint-4", "verl1/global_step_4"
TRAINER, FSDP1_SAME = "trainer/checkpoint-4", "verl1_same/global_step_4"
NEMO, VEOMNI, STATE = "nemo/step_4", "veomni/global_step_4", "state/save_state"
VERL_LORA, LORA = "verl_lora/global_step_4", "lora/checkpoint-4"


def groups_of(model: nn.Module, one: bool) -> list[dict[str, Any]]:
    """Decayed parameters and the others, as the Trainer has them; or all in one group, as verl does."""
    if one:
        return [{"params": list(model.parameters()), "weight_decay": 0.01}]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n in decayed], "weight_decay": 0.01},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]


def train(model: nn.Module, one: bool = False) -> tuple[torch.optim.AdamW, Any]:
    optimizer = torch.optim.AdamW(groups_of(model, one), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(3, 90, (8, 12), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer, schedule


def write_formats() -> None:
    """Called in each of two processes."""
    root, rank, world = Path(os.environ[FOLDER]), dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    model = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, schedule = train(model)
    _reference(root, model, optimizer, schedule)
    _rank_files(root / VERL / "actor", model, optimizer, schedule, 2)
    weights, moments = get_state_dict(model, [optimizer])
    rest = {"scheduler": schedule.state_dict(), "progress": {"step": STEPS, "total_tokens": 10}}
    dcp.save({"app": {"model": weights, "optimizers": moments, **rest}}, checkpoint_id=root / PRIME / "trainer")
    dcp.save(
        {"app": {"model": weights, "optimizers": moments}}, checkpoint_id=root / OPENRLHF / "dcp_checkpoint" / "_actor"
    )
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    tree = {**model.state_dict(), "optimizer": flat, "lr_scheduler": schedule.state_dict()}
    dcp.save({**tree, "train_state": {"step": torch.tensor(STEPS)}}, checkpoint_id=root / TITAN)
    dcp.save({"model": weights}, checkpoint_id=root / NEMO / "policy" / "weights")
    state = {"optim": {"optim": moments, "sched": schedule.state_dict()}}
    dcp.save(state, checkpoint_id=root / NEMO / "policy" / "optimizer")
    _rank_files(root / VEOMNI / "actor", model, optimizer, schedule, 2, flat)
    if rank == 0:
        AutoTokenizer.from_pretrained(root / "policy").save_pretrained(root / NEMO / "policy" / "tokenizer")
        extra = {"client_state": {}, "scheduler": schedule.state_dict()}
        torch.save(extra, root / OPENRLHF / "dcp_checkpoint" / "_actor" / "extra_state.pt")
    PartialState(cpu=True)
    me = SimpleNamespace(num_processes=world, process_index=rank, is_main_process=rank == 0, is_fsdp2=True)
    for kind, name, ways in (("FULL", FULL, {}), ("SHARDED", SHARDED, {}), ("SHARDED", RANKED, {"use_dcp": False})):
        plugin: Any = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=f"{kind}_STATE_DICT")
        save_fsdp_model(plugin, me, model, str(root / name), adapter_only=True, **ways)
        save_fsdp_optimizer(plugin, me, optimizer, model, str(root / name), **ways)
        if rank == 0:
            torch.save(schedule.state_dict(), root / name / "scheduler.pt")
            _trainer_state(root / name)
    _adapter(root, mesh)
    _fsdp1(root, mesh)
    _fsdp1_same(root, mesh)


def _adapter(root: Path, mesh: Any) -> None:
    """LoRA under FSDP2: as verl saves it, every parameter given to the optimizer, and as accelerate does, the adapter alone."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    model: Any = get_peft_model(base, lora)
    model.base_model.model.config.name_or_path = model.peft_config["default"].base_model_name_or_path = str(
        root / "policy"
    )
    whole = copy.deepcopy(model)
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, schedule = train(model, one=True)
    _rank_files(root / VERL_LORA / "actor", model, optimizer, schedule, 2)
    plugin: Any = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    me = SimpleNamespace(num_processes=dist.get_world_size(), process_index=dist.get_rank(), is_fsdp2=True)
    me.is_main_process = me.process_index == 0
    save_fsdp_model(plugin, me, model, str(root / LORA), adapter_only=True)
    save_fsdp_optimizer(plugin, me, optimizer, model, str(root / LORA))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "moments": moments["state"]}, root / "reference_lora.pt")
        whole.load_state_dict(weights)
        whole.save_pretrained(root / VERL_LORA / "actor" / "lora_adapter")
        for place in (root / LORA, root / "adapter"):
            whole.peft_config["default"].save_pretrained(str(place))


def _fsdp1(root: Path, mesh: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    wrap = ModuleWrapPolicy({LlamaDecoderLayer})
    model = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"), device_mesh=mesh)
    optimizer, schedule = train(model, one=True)
    configs = ShardedStateDictConfig(offload_to_cpu=False), ShardedOptimStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *configs):
        _rank_files(root / FSDP1 / "actor", model, optimizer, schedule, 1)


def _fsdp1_same(root: Path, mesh: Any) -> None:
    """The reference's own weights and moments under FSDP1: vectors of moments are a model's that has them as weights."""
    found = torch.load(root / "reference.pt")

    def cut(values: dict[str, Any]) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
        model.load_state_dict(values, strict=False)
        wrap = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"), device_mesh=mesh)

    model = cut(found["weights"])
    first, second = (
        list(cut({name: e[k] for name, e in found["moments"].items()}).parameters()) for k in ("exp_avg", "exp_avg_sq")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for p, m, v in zip(model.parameters(), first, second, strict=True):
        optimizer.state[p] = {"step": torch.tensor(float(STEPS)), "exp_avg": m.data, "exp_avg_sq": v.data}
    configs = ShardedStateDictConfig(offload_to_cpu=False), ShardedOptimStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *configs):
        _rank_files(root / FSDP1_SAME / "actor", model, optimizer, schedule, 1)


def _rank_files(
    folder: Path, model: Any, optimizer: torch.optim.AdamW, schedule: Any, version: int, flat: Any = None
) -> None:
    """As verl's FSDPCheckpointManager; flat: the optimizer's state by name, as its VeOmni engine has it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    ending = f"world_size_{world}_rank_{rank}.pt"
    torch.save(model.state_dict(), folder / f"model_{ending}")
    torch.save(flat or optimizer.state_dict(), folder / f"optim_{ending}")
    extra = {"lr_scheduler": schedule.state_dict(), "rng": {"cpu": torch.get_rng_state()}}
    torch.save(extra, folder / f"extra_state_{ending}")
    if rank == 0:
        (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": version, "world_size": world}))
        beside = folder / "huggingface"
        AutoTokenizer.from_pretrained(Path(os.environ[FOLDER]) / "policy").save_pretrained(beside)
        LlamaConfig.from_pretrained(Path(os.environ[FOLDER]) / "policy").save_pretrained(beside)
    dist.barrier()


def _reference(root: Path, model: Any, optimizer: torch.optim.AdamW, schedule: Any) -> None:
    """The gathered state: in `reference.pt` by name, and as the Trainer's checkpoint of one process."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=whole)
    if dist.get_rank():
        return
    torch.save(
        {"weights": weights, "moments": moments["state"], "groups": moments["param_groups"]}, root / "reference.pt"
    )
    plain = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    plain.load_state_dict(weights)
    mine = torch.optim.AdamW(groups_of(plain, False), lr=1e-3)
    names = [name for group in moments["param_groups"] for name in group["params"]]
    state: dict[str, Any] = copy.deepcopy(mine.state_dict())
    state["state"] = {number: moments["state"][name] for number, name in enumerate(names)}
    for group in state["param_groups"]:
        group["initial_lr"] = 1e-3
    mine.load_state_dict(state)
    save_as_trainer(root / TRAINER, root / "policy", plain, mine.state_dict(), schedule.state_dict())


def save_as_trainer(
    folder: Path, policy: Path, model: Any, optimizer: dict[str, Any], schedule: dict[str, Any]
) -> None:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    torch.save(optimizer, folder / "optimizer.pt")
    torch.save(schedule, folder / "scheduler.pt")
    _trainer_state(folder)


def _trainer_state(folder: Path) -> None:
    rows = [{"step": step, "learning_rate": 1e-3, "loss": 1.0} for step in range(1, STEPS + 1)]
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": STEPS, "max_steps": STEPS, "log_history": rows})
    )
