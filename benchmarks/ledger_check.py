"""Shares of a ledger beside retraining: groups of prompts are left out of twenty steps, one group at a time.

    python benchmarks/ledger_check.py        the small policy's run of price_check.py, its steps 2 to 21, twenty groups; minutes

The training prompts of these steps are put into 20 groups at random. For each group the steps are taken again from checkpoint-1
with the group's weights at 0, on the recorded sequences; clipping, momentum and second moments follow from the rest. Entropy
after the last is measured on common completions, drawn by the run's own last policy and reweighted. The ledger says that leaving
a group out changes entropy by minus its share. The linear datamodelling score is Spearman's rank correlation of the two over
groups (Park et al. 2023). The page goes to benchmarks/results/ledger/README.md, the rows beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.price_check import small_run
from entropy_core.entropy import effective_sample_size, normalized_weights, score_coefficients
from entropy_core.gradients import batch_gradients
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import token_statistics
from entropy_experiments.console.ledger import ledger_lines
from entropy_experiments.ledger.ledger import run_ledger
from entropy_experiments.ledger.run_again import RunAgain
from entropy_experiments.records.ledger_record import Ledger
from entropy_experiments.records.record import json_of, validated
from rl_training.files import write_whole
from rl_training.intervals import correlation_interval
from rl_training.sampling import draw

RESULTS = Path(__file__).parent / "results" / "ledger"
GROUPS, LAST, SEQUENCES, COMMON = 20, 21, 256, 1024


def left_out(run: Path, groups: list[set[int]]) -> tuple[list[float], list[float]]:
    """Measured change of entropy without each group, nats per token, and the effective sample sizes of the measurements."""
    whole = RunAgain(run, "cpu", True, LAST)
    for _ in whole.steps():
        pass
    sampling = whole.plan.sampling_config
    drawn = draw(
        whole.model, whole.checkpoint.tokenizer, whole.plan.task.heldout[:COMMON], 1, sampling, 7, "evaluation"
    )
    batch = drawn.to_batch(sampling)
    before = token_statistics(whole.model, batch)
    changes, sizes = [], []
    for members in groups:
        again = RunAgain(run, "cpu", True, LAST)
        for number in range(again.first + 1, again.last + 1):
            rollouts, columns, weights = again.sequences(number)
            keep = torch.tensor([s.prompt_index not in members for s in rollouts])
            objective = score_coefficients(columns, -(weights * keep))
            again.advance(
                again.next_step(batch_gradients(again.model, columns, [objective], again.passes, True)[0], number)
            )
        after = token_statistics(again.model, batch)
        changes.append(snis_entropy_change(before, after, batch).change)
        sizes.append(effective_sample_size(normalized_weights(after.scores() - before.scores())))
        print(f"group {len(changes)}: {changes[-1]:+.5f}", flush=True)
    return changes, sizes


def page(content: dict) -> str:
    """The page, from the rows that are kept."""
    predicted, measured = np.array(content["predicted"]), np.array(content["measured"])
    low, high = correlation_interval(*(np.argsort(np.argsort(v)) * 1.0 for v in (predicted, measured)))
    score, slope = float(spearmanr(predicted, measured)[0]), float(predicted @ measured / (predicted @ predicted))
    found = validated(Ledger, content["ledger"], "small.json")
    rows = "\n".join(
        f"| {n + 1} | {p:+.5f} | {m:+.5f} |" for n, (p, m) in enumerate(zip(predicted, measured, strict=True))
    )
    size = min(content["effective_sample_size"])
    return _TEXT.format(
        score=score, low=low, high=high, slope=slope, rows=rows, lines="\n".join(ledger_lines(found)),
        groups=GROUPS, size=size, common=COMMON,
    )  # fmt: skip


_TEXT = """# The ledger beside retraining

By `python benchmarks/ledger_check.py`: the [small policy](../../probe_replay/small_policy.py), all weights trained, steps 2
to 21. Its training prompts are put into {groups} groups at random; for each the twenty steps are taken again without the
group, on the recorded sequences, and entropy after the last is measured on {common} common completions, reweighted (effective
sample size at least {size:.0f}). The [ledger](../../../docs/analyses/ledger.md) says that leaving a group out changes it by
minus its share.

**Linear datamodelling score** (Spearman's rank correlation over groups): {score:.2f}, 95% interval {low:.2f} to {high:.2f}.
Slope of measured on predicted, through 0: {slope:.2f}.

| group | predicted, nats per token | measured |
|---|---|---|
{rows}

What it cannot say: no completion is drawn anew, so what a group did to the sequences of later steps is not in it.

```text
{lines}
```
"""


def main() -> None:
    """Writes the page and its rows."""
    run = small_run()
    found = run_ledger(run, SEQUENCES, "cpu", True, last=LAST, named_prompts=10**6)
    shares = {row.prompt_index: row.share.value or 0.0 for row in found.by_prompt if row.prompt_index is not None}
    order = np.random.default_rng(0).permutation(sorted(shares))
    groups = [set(part.tolist()) for part in np.array_split(order, GROUPS)]
    measured, sizes = left_out(run, groups)
    content = {
        "predicted": [-sum(shares[prompt] for prompt in members) for members in groups],
        "measured": measured,
        "effective_sample_size": sizes,
        "ledger": json_of(found.model_copy(update={"by_prompt": found.by_prompt[:10]})),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / "small.json", json.dumps(content, indent=1) + "\n")
    write_whole(RESULTS / "README.md", page(content))
    print(page(content))


if __name__ == "__main__":
    main()
