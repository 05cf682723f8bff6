"""What the analysis "prompt_structure" says, from its numbers.

A difference counts where its permutation test of the cosine rejects at 5% and raw K1 differs in the same direction: the cosine
weighs all directions alike, K1 the long gradients most, and where the two contradict each other neither is "the" answer.
"""

from __future__ import annotations

from typing import Any

from entropy_experiments.analyses.distinct_sequences import duplicates_in_words
from entropy_experiments.text.numbers import plain, plus_minus, signed

_LEVEL = 0.05


def structure_sentence(result: dict[str, Any]) -> str:
    """The analysis in one sentence; nothing is claimed where cosine and raw K1 differ in sign."""
    single = result["single_batch"]
    same, contrast = _same_prompt_words(result), _correctness_words(result["within_group"])
    value = (
        f"the training batch in both roles would put the step's batch part at {signed(single['value'])} nats per token"
    )
    if single["bias"]["value"] is None:
        return f"{same}; {contrast}; {value} ({single['reason']})."
    bias = plus_minus(single["bias"]["value"], single["bias"]["standard_error"])
    return (
        f"{same}; {contrast}; {value}, the U-statistic over its prompts at {signed(single['u_statistic']['value'])}: "
        f"a bias of {bias} from pairing prompts with themselves."
    )


def _same_prompt_words(result: dict[str, Any]) -> str:
    train, units = result["train"], f"{duplicates_in_words(result['duplicates'])}, of {result['n_prompts']} prompts"
    test = train["cosine"]["test"]
    if test["p_value"] is None:
        return f"Same-prompt and cross-prompt pairs cannot be compared ({test['reason']})"
    numbers = ", ".join(
        f"{name} {plain(side['same_prompt']['mean'], 2)} against {plain(side['cross_prompt']['mean'], 2)}, "
        f"p = {plain(side['test']['p_value'], 2)}"
        for name, side in (("mean cosine", train["cosine"]), ("mean raw K₁", train["raw"]))
    )
    numbers = f"({numbers}; {units})"
    if test["p_value"] > _LEVEL:
        verdict = "not measurably more or less than"
    elif not train["signs_agree"]:
        return (
            "Whether sequences of one prompt move each other more or less than sequences of different prompts is not said: "
            f"directions and raw K₁ differ in sign {numbers}"
        )
    else:
        verdict = "more than" if test["difference"] > test["null_mean"] else "less than"
    return f"Sequences of one prompt move each other {verdict} sequences of different prompts {numbers}"


def _correctness_words(groups: dict[str, Any]) -> str:
    test, raw = groups["cosine"]["test"], groups["raw"]["test"]
    if test["p_value"] is None:
        return f"correct and wrong ones cannot be compared ({test['reason']})"
    found = test["p_value"] <= _LEVEL
    numbers = (
        f"(equally correct pairs have a cosine {signed(test['difference'], 2)} above mixed ones, "
        f"p = {plain(test['p_value'], 2)}, and a raw K₁ {signed(raw['difference'], 2)}, p = {plain(raw['p_value'], 2)})"
    )
    if found and not groups["signs_agree"]:
        return (
            f"whether correctness matters within a prompt is not said: directions and raw K₁ differ in sign {numbers}"
        )
    return f"within a prompt correctness {'matters' if found else 'does not show'} {numbers}"
