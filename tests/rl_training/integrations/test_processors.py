"""A processor in place of a tokenizer: the probe attaches, DrGRPOTrainer saves, the checkpoint is loaded with its tokenizer."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import ProcessorMixin
from trl import GRPOTrainer

from entropy_experiments.checkpoint_loader import load_checkpoint
from rl_training.algs.dr_grpo import DrGRPOTrainer
from rl_training.config import EntropyProbeConfig, LoraConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import add_lora, load_model_and_tokenizer
from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.run.rollouts import read_rollouts
from rl_training.run.sidecar import read_sidecar
from rl_training.train import trainer_arguments
from tests.rl_training.integrations.test_trl_integration import check_same_tokens, logged, make_trainer
from tests.tiny_policy import even_start_reward, tiny_train_config


class TextProcessor(ProcessorMixin):
    """Of a multimodal model's processor the part that text goes through; images are not its business here."""

    attributes = ["tokenizer"]  # noqa: RUF012 - transformers reads it from the class
    tokenizer_class = "AutoTokenizer"

    def __call__(self, text=None, images=None, **kwargs):
        return self.tokenizer(text, **kwargs)


def processor_of(tokenizer, own_template: bool = False) -> TextProcessor:
    processor = TextProcessor(tokenizer=tokenizer)
    if own_template:
        processor.chat_template, tokenizer.chat_template = tokenizer.chat_template, None
    return processor


def test_the_tokenizer_of_a_processor_has_its_chat_template(tiny_policy) -> None:
    _, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    template = tokenizer.chat_template
    assert text_tokenizer(tokenizer) is tokenizer
    processor = processor_of(tokenizer)
    assert text_tokenizer(processor) is tokenizer
    processor = processor_of(tokenizer, own_template=True)
    found = text_tokenizer(processor)
    assert found.chat_template == template and tokenizer.chat_template is None, "the processor's tokenizer was changed"
    assert found.pad_token_id == tokenizer.pad_token_id and found.decode([5, 6]) == tokenizer.decode([5, 6])


@pytest.mark.parametrize("rollouts", ["current", "fresh"])
def test_the_probe_attaches_to_a_trainer_with_a_processor(tiny_policy, tmp_path, rollouts) -> None:
    plain = make_trainer(tiny_policy, tmp_path)
    plain.model.config.image_token_id = (
        plain.processing_class.unk_token_id
    )  # TRL asks every model behind a processor for it
    trainer = GRPOTrainer(
        plain.model, even_start_reward, args=plain.args, train_dataset=plain.train_dataset,
        processing_class=processor_of(plain.processing_class),
    )  # fmt: skip
    config = EntropyProbeConfig(mode="simple", preset="accurate", rollouts=rollouts, on_error="raise", eval_sequences=8)
    attach_entropy_probe(trainer, config, console=False)
    trainer.train()
    check_same_tokens(logged(trainer))


def test_dr_grpo_saves_and_the_checkpoint_is_loaded(tiny_policy, tmp_path) -> None:
    config = tiny_train_config(tiny_policy, tmp_path / "run")
    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    model.config.image_token_id = tokenizer.unk_token_id
    prompts = [
        {"prompt": [{"role": "user", "content": f"{i}+{i}="}], "prompt_index": i, "answer": str(2 * i)}
        for i in range(8)
    ]
    trainer = DrGRPOTrainer(
        model=add_lora(model, LoraConfig(r=4)),
        args=trainer_arguments(config, on_cpu=True),
        processing_class=processor_of(tokenizer, own_template=True),
        reward_funcs=[even_start_reward],
        train_dataset=Dataset.from_list(prompts),
        model_name=str(tiny_policy),
    )
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    sidecar = read_sidecar(folder)
    assert sidecar is not None and sidecar.sampling.pad_token_id == tokenizer.pad_token_id
    assert all(row.completion for row in read_rollouts(tmp_path / "run", 2))
    loaded = load_checkpoint(folder, device="cpu")
    assert loaded.tokenizer("2+2=")["input_ids"] == tokenizer("2+2=")["input_ids"]
