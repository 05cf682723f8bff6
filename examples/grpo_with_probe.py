"""A plain TRL script with the entropy probe attached: one line more than without it."""

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models import load_model_and_tokenizer


def says_seven(completions, **_):
    return [float("7" in completion) for completion in completions]


def main(model_name="smollm2-135m", steps=4, output_dir="runs/grpo-with-probe"):
    model, tokenizer = load_model_and_tokenizer(model_name)
    arguments = GRPOConfig(
        output_dir=output_dir, max_steps=steps, logging_steps=1, learning_rate=1e-4, per_device_train_batch_size=16,
        num_generations=4, max_completion_length=8, gradient_checkpointing=False, bf16=False, report_to="tensorboard",
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": f"{a} + {b} ="} for a in range(1, 7) for b in range(1, 7)])
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model, says_seven, args=arguments, train_dataset=prompts, processing_class=tokenizer, peft_config=lora
    )
    attach_entropy_probe(trainer)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "smollm2-135m", *map(int, sys.argv[2:3]), *sys.argv[3:4])
