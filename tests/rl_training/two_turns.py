"""A rollout function for GRPOTrainer: the policy draws, an environment answers by what was drawn, and the policy draws again."""

from __future__ import annotations

from typing import Any

from rl_training.sampling import generate_completions, make_sampling_config, tokenize_prompts

FOREIGN = [40, 41, 42, 43]


def two_turns(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Up to four drawn tokens, then an answer of one to four foreign ones, then as many drawn ones again. Where the first turn
    ends in an even token the answer is the last word; an end of sequence ends a completion at once.
    """
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    sampling_config = make_sampling_config(model, tokenizer, trainer.args.temperature, 4)
    seed = 1000 * trainer.state.global_step
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    completions = generate_completions(model, prompt_ids, sampling_config, seed)
    masks = [[1] * len(ids) for ids in completions]
    going_on = []
    for n, ids in enumerate(completions):
        if ids[-1] in sampling_config.eos_token_ids:
            continue
        answer, last = FOREIGN[: 1 + ids[0] % 4], ids[-1]
        completions[n], masks[n] = [*ids, *answer], masks[n] + [0] * len(answer)
        if last % 2:
            going_on.append(n)
    if going_on:
        more = generate_completions(
            model, [prompt_ids[n] + completions[n] for n in going_on], sampling_config, seed + 1
        )
        for n, ids in zip(going_on, more, strict=True):
            completions[n], masks[n] = completions[n] + ids, masks[n] + [1] * len(ids)
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}
