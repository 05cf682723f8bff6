"""A plain TRL script with the entropy probe attached: one line more than without it."""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models import load_model_and_tokenizer


def says_seven(completions, **_):
    return [float("7" in completion) for completion in completions]


def main(model_name="smollm2-135m", steps=4, output_dir="runs/grpo-with-probe"):
    model, tokenizer = load_model_and_tokenizer(model_name)
    model.requires_grad_(True)
    arguments = GRPOConfig(
        output_dir=output_dir, max_steps=steps, logging_steps=1, learning_rate=1e-5, per_device_train_batch_size=16,
        num_generations=4, max_completion_length=8, gradient_checkpointing=False, bf16=False, report_to="tensorboard",
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": f"{a} + {b} ="} for a in range(1, 7) for b in range(1, 7)])
    trainer = GRPOTrainer(model, says_seven, args=arguments, train_dataset=prompts, processing_class=tokenizer)
    attach_entropy_probe(trainer)
    trainer.train()
    for entry in trainer.state.log_history:
        if "entropy_probe/predicted" in entry:
            predicted, measured = entry["entropy_probe/predicted"], entry["entropy_probe/measured"]
            print(f"step {entry['step']}: predicted {predicted:+.4f}, measured {measured:+.4f} nats per token")


if __name__ == "__main__":
    main(*sys.argv[1:])
