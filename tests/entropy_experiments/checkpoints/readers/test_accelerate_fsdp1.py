"""What accelerate saves under FSDP1, sharded, by two gloo processes. FULL_STATE_DICT cannot be had here: on a CPU torch's FSDP1
reads freed memory when it gathers weights, and what it gathers of moments is not what the shards hold.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_model, save_fsdp_optimizer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from entropy_experiments.checkpoints.readers.layouts import find_source
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.tiny_policy import save_tiny_policy
from tests.two_processes import in_two_processes


def untied(root: Path) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(root / "policy", tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write() -> None:
    root = Path(os.environ[written.FOLDER])
    PartialState(cpu=True)
    wrap = ModuleWrapPolicy({LlamaDecoderLayer})
    device = torch.device("cpu")
    model = FullyShardedDataParallel(untied(root), auto_wrap_policy=wrap, device_id=device, use_orig_params=True)
    optimizer, _ = written.train(model)
    me = SimpleNamespace(num_processes=dist.get_world_size(), process_index=dist.get_rank(), is_fsdp2=False)
    me.is_main_process = me.process_index == 0
    plugin: Any = FullyShardedDataParallelPlugin(fsdp_version=1, state_dict_type="SHARDED_STATE_DICT")
    save_fsdp_model(plugin, me, model, str(root / "checkpoint-4"), adapter_only=True)
    save_fsdp_optimizer(plugin, me, optimizer, model, str(root / "checkpoint-4"))


@pytest.mark.long
def test_shards_of_fsdp1_are_the_moments_of_one_process(tmp_path, monkeypatch) -> None:
    save_tiny_policy(tmp_path / "policy")
    monkeypatch.setenv(written.FOLDER, str(tmp_path))
    in_two_processes(write)
    folder = tmp_path / "checkpoint-4"
    state = find_source(folder).read()
    assert state.layout == "accelerate or TRL, FSDP, sharded" and state.step == written.STEPS
    model = untied(tmp_path)
    optimizer, _ = written.train(model)
    parameters = dict(model.named_parameters())
    assert state.adam is not None and state.adam.named
    assert state.adam.entries.keys() == state.weights.keys() == parameters.keys()
    for name, p in parameters.items():
        moments = optimizer.state[p]
        assert torch.allclose(state.weight(name), p.detach(), rtol=0, atol=1e-6), name
        for found, key in ((state.adam.first(name), "exp_avg"), (state.adam.second(name), "exp_avg_sq")):
            assert (found - moments[key]).abs().max() <= 1e-6 * moments[key].abs().max(), (name, key)
    (folder / "optimizer_0" / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
        find_source(folder).read()
