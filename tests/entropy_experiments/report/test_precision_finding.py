"""What a report says of the precision that its run was trained in."""

from entropy_experiments.records.record import validated
from entropy_experiments.records.summary import Summary
from entropy_experiments.report.precision_finding import _WITHOUT_COMPARISON, precision_sentences
from tests.entropy_experiments.whole_summary import whole_summary

POLICY = {
    "sequences": 16, "tokens": 112, "logprob": 0.0035, "entropy": 1.0, "entropy_in_training": 1.002, "gradient": 0.011,
    "predicted": -0.01, "predicted_in_training": -0.0102,
}  # fmt: skip
STEP = {
    "weights": "bfloat16", "moments": "bfloat16", "moved": 0.31, "length": 0.56, "predicted": -0.01,
    "predicted_in_training": -0.004,
}  # fmt: skip


def sentences(**record):
    content = record and {"weights": "bfloat16", "autocast": "no", "policy": None, "step": None} | record
    return list(
        precision_sentences(validated(Summary, whole_summary(training_precision=content or None), "summary.json"))
    )


def test_nothing_is_said_of_a_run_in_the_analysis_own_precision():
    assert sentences() == []


def test_rounding_of_passes():
    (told,) = sentences(policy=POLICY)
    assert told.tone == "plain" and told.text == (
        "The run had weights in bfloat16; numbers here are without the rounding of its passes. Passes in that precision differ "
        "on 16 sequences (112 tokens): a token's log-probability by 0.0035 nats (root mean square), entropy by +0.20%, its "
        "gradient by 1.1% of its norm, the predicted change by +2.0%."
    )
    mixed = sentences(policy=POLICY, weights="float32", autocast="bf16")[0].text
    assert mixed.startswith("The run had bf16 mixed precision;")
    for worse in ({"gradient": 0.2}, {"predicted_in_training": -0.0115}):
        assert sentences(policy=POLICY | worse)[0].tone == "warning"
    missing = sentences(policy=POLICY | dict.fromkeys(("predicted", "predicted_in_training", "gradient")))[0]
    assert missing.text.endswith("entropy by +0.20%.")


def test_rounding_of_the_step():
    _, told = sentences(policy=POLICY, step=STEP)
    assert told.tone == "warning" and told.text == (
        "The run's optimizer keeps weights and moments in bfloat16: the step that it takes itself moves 31% of the weights that "
        "the analysed step moves, is 0.56 times as long, and is predicted to change entropy by −0.0040 in place of −0.010 nats "
        "per token."
    )
    close = sentences(step=STEP | {"weights": "float32", "predicted_in_training": -0.0101})[0]
    assert close.tone == "plain" and close.text.startswith("The run's optimizer keeps moments in bfloat16:")


def test_what_was_not_looked_at():
    reasons = {
        "cut": "cut over processes",
        "offloaded": "offloaded",
        "few_sequences": "two evaluation",
        "not_recorded": "not recorded",
    }
    assert reasons.keys() == set(_WITHOUT_COMPARISON)
    for reason, words in reasons.items():
        (told,) = sentences(not_compared=reason)
        assert told.tone == "plain" and words in told.text and "{" not in told.text


def test_finer_weights_than_those_of_passes():
    (stored,), (rounded,) = sentences(finer_weights="stored"), sentences(finer_weights="rounded")
    assert stored.tone == "plain" and "the checkpoint holds these: the analysed step is theirs" in stored.text
    assert rounded.tone == "warning" and "The analysed step is that of the finer weights" in rounded.text
