"""What each guide for another trainer expects in the working directory: a small run of that trainer under the guide's names."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.entropy_experiments.buffers.dumps.files_of_trainers import WRITERS, Sequence
from tests.entropy_experiments.checkpoints.readers import written_formats as written
from tests.entropy_experiments.checkpoints.readers.stored.write_zero import HERE
from tests.entropy_experiments.checkpoints.readers.test_import import in_eight_bits
from tests.entropy_experiments.checkpoints.readers.zero_layout import deepspeed_names

LONGEST = 8


class Runs:
    """formats: every layout of one tiny policy. adapter: a checkpoint of the Trainer with an adapter. cwd: where commands are
    typed.
    """

    def __init__(self, formats: Path, adapter: Path, cwd: Path) -> None:
        self.formats, self.adapter, self.cwd = formats, adapter, cwd
        rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(40) for b in range(40)]
        (cwd / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(self, guide: str) -> None:
        """Make what the guide needs."""
        makers: dict[str, Callable[[], None]] = {
            "trl-fsdp": self._trl_fsdp, "trl-deepspeed": self._trl_deepspeed, "unsloth": self._unsloth, "verl": self._verl,
            "openrlhf": self._openrlhf, "prime-rl": self._prime_rl,
        }  # fmt: skip
        makers[guide]()

    def _trl_fsdp(self) -> None:
        place = self._copied(self.formats / written.SHARDED, "runs/mine/checkpoint-40")
        trainer_state(place, 40)
        self._base("Qwen/Qwen2.5-0.5B-Instruct", self.formats / "policy")
        self._dump("trl", "runs/mine", 41)

    def _trl_deepspeed(self) -> None:
        place = self._copied(self.formats / "zero2/checkpoint-4", "runs/mine/checkpoint-40")
        zero_at_step(place, 40)
        trainer_state(place, 40)
        for path in (self.formats / written.TRAINER).iterdir():
            if path.name.startswith(("config", "tokenizer", "model.", "chat")):
                shutil.copyfile(path, place / path.name)
        self._dump("trl", "runs/mine", 41)

    def _unsloth(self) -> None:
        place = self._copied(self.adapter, "runs/mine/checkpoint-4")
        (place / "entropy_experiments.json").unlink()
        base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        self._base("Qwen/Qwen2.5-0.5B-Instruct", Path(base))
        as_bitsandbytes(place / "optimizer.pt")
        for step in (4, 5):
            self._dump("trl", "runs/mine", step, Path(base))

    def _verl(self) -> None:
        place = self._copied(self.formats / written.VERL, "runs/verl/global_step_40")
        fused(place / "actor" / "huggingface")
        self._dump("verl", "runs/verl/rollouts", 41)
        self._dump("verl", "runs/verl/validation", 40)

    def _openrlhf(self) -> None:
        zero_at_step(self._copied(self.formats / "zero2/checkpoint-4", "runs/openrlhf/_actor"), 40)
        self._base("runs/openrlhf/global_step40_hf", self.formats / "policy")

    def _prime_rl(self) -> None:
        found = torch.load(self.formats / "reference.pt")
        state = {"model": found["weights"], "optimizers": {"state": found["moments"], "param_groups": found["groups"]},
                 "scheduler": {"last_epoch": 40}, "progress": {"step": 40, "total_tokens": 10, "total_samples": 10}}  # fmt: skip
        place = self.cwd / "outputs/mine/checkpoints/step_40/trainer"
        place.mkdir(parents=True)
        dcp.save({"app": state}, checkpoint_id=place, no_dist=True)
        self._base("Qwen/Qwen3-0.6B", self.formats / "policy")
        for step in (41, 42):
            self._dump("prime_rl", "outputs/mine", step)
        later = self.cwd / "outputs/mine/rollouts/step_42/train"
        (later / "effective").rename(later / "all")

    def _copied(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.cwd / name))

    def _base(self, name: str, source: Path) -> None:
        """A folder under the name that the guide has on the hub."""
        fused(self._copied(source, name))

    def _dump(self, trainer: str, folder: str, step: int, policy: Path | None = None) -> None:
        policy = policy or self.formats / written.TRAINER
        tokenizer = AutoTokenizer.from_pretrained(fused(Path(shutil.copytree(policy, self.cwd / f"policy-{step}"))))
        sequences = drawn(policy, tokenizer, step)
        (self.cwd / folder).mkdir(parents=True, exist_ok=True)
        WRITERS[trainer](self.cwd / folder, step, sequences, tokenizer)


def drawn(policy: Path, tokenizer: Any, seed: int) -> list[Sequence]:
    """Six prompts, four completions of each, drawn by the policy; those that their text gives back. Steps that follow each other
    share no prompt.
    """
    model, chosen = AutoModelForCausalLM.from_pretrained(policy).eval(), random.Random(seed)
    torch.manual_seed(seed)
    found = []
    for group in range(6):
        prompt = [{"role": "user", "content": f"{2 * chosen.randrange(5) + seed % 2} + {chosen.randrange(10)} ="}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for k in range(4):
            row = [*ids]
            with torch.no_grad():
                while len(row) < len(ids) + LONGEST and (len(row) == len(ids) or row[-1] != tokenizer.eos_token_id):
                    row.append(int(torch.multinomial(model(torch.tensor([row])).logits[0, -1].softmax(-1), 1)))
                logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
            logprobs = [float(logs[at - 1, row[at]]) for at in range(len(ids), len(row))]
            completion = row[len(ids) :]
            ended = completion[-1] == tokenizer.eos_token_id
            if not set(completion[: -1 if ended else None]) & set(tokenizer.all_special_ids):
                found.append(Sequence(prompt, ids, completion, float(k % 2), 2.0 * (k % 2) - 1.0, logprobs, group))
    return found


def fused(folder: Path) -> Path:
    """Its tokenizer gives texts back as they were."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": {"type": "Fuse"}}))
    return folder


def trainer_state(folder: Path, step: int) -> None:
    rows = [{"step": s, "learning_rate": 1e-3, "loss": 1.0} for s in (step - 1, step)]
    state = {"global_step": step, "max_steps": 100, "log_history": rows}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def zero_at_step(folder: Path, step: int) -> None:
    place = (folder / "global_step4").rename(folder / f"global_step{step}")
    (folder / "latest").write_text(place.name)
    with deepspeed_names():
        content = torch.load(place / "mp_rank_00_model_states.pt", weights_only=False)
        torch.save({**content, "global_steps": step}, place / "mp_rank_00_model_states.pt")
        for path in place.glob("*optim_states.pt"):
            content = torch.load(path, weights_only=False)
            for entry in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
                entry["step"] = torch.tensor(float(step))
            torch.save(content, path)


def as_bitsandbytes(path: Path) -> None:
    """Moments as bitsandbytes' AdamW keeps them: matrices in blocks of 8 bits, the rest in 32."""
    maps = torch.load(HERE / "adamw_8bit.pt")["state"][0]["__bnb_optimizer_quant_state__"]
    content = torch.load(path)
    for number, entry in content["state"].items():
        parts: dict[str, torch.Tensor] = {}
        for k, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            own = in_eight_bits(entry[name], maps[f"qmap{k}"])
            parts |= {f"{field}{k}": value for field, value in own.items()}
        content["state"][number] = {"step": int(entry["step"]), "__bnb_optimizer_quant_state__": parts}
    kept = ("lr", "betas", "eps", "weight_decay", "initial_lr", "params")
    content["param_groups"] = [
        {**{k: group[k] for k in kept if k in group}, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
        for group in content["param_groups"]
    ]
    torch.save(content, path)
