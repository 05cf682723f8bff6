"""Writes the stored checkpoints of DeepSpeed beside this file; needs deepspeed, which the tests do not.

Run once for each rank, in two processes: `python write_zero.py RANK PORT`. Written with deepspeed 0.19.8 on a CPU by gloo
(DS_ACCELERATOR=cpu). `expected.pt` holds the float32 weights by DeepSpeed's own zero_to_fp32, and the moments of the same steps
taken by one process with torch's AdamW and the same clipping.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
STAGES = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero2_bf16": (2, True)}
STEPS, CLIP = 3, 1.0


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def groups(model: torch.nn.Module) -> list[dict]:
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.01},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 30, (4, 7), generator=generator) for _ in range(STEPS)]


def alone() -> dict:
    model = policy()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    for ids in batches():
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}


def main(rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name, (stage, bf16) in STAGES.items():
        model = policy()
        settings = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True, "gradient_clipping": CLIP,
        }  # fmt: skip
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        for ids in batches():
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(str(HERE / name))
        dist.barrier()
        if rank == 0:
            weights = get_fp32_state_dict_from_zero_checkpoint(str(HERE / name))
            expected = {"weights": {n: w.clone() for n, w in weights.items()}, "moments": alone()}
            torch.save(expected, HERE / name / "expected.pt")
            for script in (HERE / name).glob("*.py"):
                script.unlink()
        dist.barrier()
    if rank == 0:
        policy().config.save_pretrained(HERE / "policy")
        shutil.rmtree(HERE / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
