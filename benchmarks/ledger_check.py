"""Does a ledger's share foretell what a run without that group does? Each is left out of the recorded steps, all taken again.

    python benchmarks/ledger_check.py run     the small policy's run (price_check), its ledger, and 20 runs of 20 steps; resumable
    python benchmarks/ledger_check.py page    the table, from the rows under benchmarks/results/ledger/

    share_G     sum of the ledger's shares of the group's training prompts, nats per token
    effect_G    h at the end of the steps as recorded less h at the end of the same steps without the group's sequences

Groups are the training prompts by number, modulo GROUPS. Without a group the other sequences keep their weights; clipping, both
moments and P answer at every step. Nothing is drawn anew: sequences are those of the record, so the effect is of training on the
group and not of what another policy would have drawn. Both ends are measured on the same sequences, drawn at the end of the full
run. The linear datamodelling score (Park et al. 2023) of single groups left out is the rank correlation of shares and effects.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.price_check import small_run
from entropy_core.directional import weights_moved
from entropy_core.entropy import effective_sample_size, normalized_weights
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.interventions import loss_coefficients
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import token_statistics
from entropy_experiments.ledger.ledger import run_ledger
from entropy_experiments.ledger.run_again import RunAgain
from rl_training.files import write_whole
from rl_training.intervals import correlation_interval
from rl_training.sampling import draw

RESULTS, ROOT = Path(__file__).parent / "results" / "ledger", Path("runs/ledger_check")
GROUPS, FIRST, STEPS, SEQUENCES = 20, 1, 20, 512
MEASURED_ON = 2048


def weights_at_the_end(run: Path, left_out: int | None) -> dict[str, Tensor]:
    """Trained weights after the recorded steps without one group."""
    again = RunAgain(run, "cpu", True, FIRST + STEPS, FIRST)
    for number in range(FIRST + 1, FIRST + STEPS + 1):
        rollouts, batch, weights = again.sequences(number)
        group = torch.tensor([-1 if s.prompt_index is None else s.prompt_index % GROUPS for s in rollouts])
        weights = torch.where(group == left_out, 0.0, weights) if left_out is not None else weights
        loss = loss_coefficients(weights, batch, weights).scaled(-1.0)
        gradient = batch_gradients(again.model, batch, [loss], again.passes, as_trained=True)[0]
        again.advance(again.next_step(gradient, number))
    return {name: p.detach().clone() for name, p in trainable_parameters(again.model).items()}


def shares(run: Path) -> dict[str, Any]:
    """The ledger's share of each group, and what its whole says."""
    ledger = run_ledger(run, SEQUENCES, "cpu", True, FIRST + STEPS, named_prompts=10**6)
    found = [0.0] * GROUPS
    for row in ledger.by_prompt:
        if row.prompt_index is not None and row.share.value is not None:
            found[row.prompt_index % GROUPS] += row.share.value
    return {"shares": found, "predicted": ledger.predicted.value, "measured": ledger.measured.value}


def run_all(seconds: float) -> bool:
    """Whatever is missing, until the time is over; whether all is there."""
    begun, run = time.monotonic(), small_run()
    ROOT.mkdir(parents=True, exist_ok=True)
    whole = ROOT / "whole.pt"
    if not whole.exists():
        torch.save(weights_at_the_end(run, None), whole)
    if not (ROOT / "shares.json").exists():
        write_whole(ROOT / "shares.json", json.dumps(shares(run)))
    for group in range(GROUPS):
        path = ROOT / f"without-{group}.pt"
        if path.exists():
            continue
        if time.monotonic() - begun > seconds:
            return False
        torch.save(weights_at_the_end(run, group), path)
        print(f"without group {group}: done", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / "rows.json", json.dumps(rows(run), indent=1) + "\n")
    return True


def rows(run: Path) -> dict[str, Any]:
    """Shares, effects with their errors, and how many of the sequences count."""
    again = RunAgain(run, "cpu", True, FIRST + STEPS, FIRST)
    model, sampling, whole = again.model, again.plan.sampling_config, torch.load(ROOT / "whole.pt")
    here = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}

    def moved(to: dict[str, Tensor]) -> Any:
        return weights_moved(model, {name: to[name] - here[name] for name in here}, 1.0)

    found = []
    with moved(whole):
        drawn = draw(
            model, again.checkpoint.tokenizer, again.plan.task.heldout[:MEASURED_ON], 1, sampling, 1, "evaluation"
        )
        batch = drawn.to_batch(sampling)
        before = token_statistics(model, batch, again.passes)
    for group in range(GROUPS):
        with moved(torch.load(ROOT / f"without-{group}.pt")):
            after = token_statistics(model, batch, again.passes)
        change = snis_entropy_change(before, after, batch)
        counting = effective_sample_size(normalized_weights(after.scores() - before.scores())) / len(batch)
        found.append({"effect": -change.change, "error": change.standard_error, "counting": counting})
    return {**json.loads((ROOT / "shares.json").read_text()), "groups": found, "steps": [FIRST + 1, FIRST + STEPS]}


def page() -> str:
    """The page, from the rows that are kept."""
    kept = json.loads((RESULTS / "rows.json").read_text())
    share = np.array(kept["shares"])
    effect, error = (np.array([g[name] for g in kept["groups"]]) for name in ("effect", "error"))
    ranks = [np.argsort(np.argsort(values)) * 1.0 for values in (share, effect)]
    low, high = correlation_interval(*ranks)
    slope = float(share @ effect / (share @ share))
    ceiling = np.sqrt(max(0.0, 1 - np.mean(error**2) / effect.var()))
    verdict = "excludes 0" if low > 0 or high < 0 else "holds 0: shares do not foretell the effects here"
    lines = [
        f"| {g} | {s:+.5f} | {e:+.5f} | {se:.5f} |"
        for g, (s, e, se) in enumerate(zip(share, effect, error, strict=True))
    ]
    return _TEXT.format(
        groups=GROUPS,
        first=kept["steps"][0],
        last=kept["steps"][1],
        score=float(np.corrcoef(ranks)[0, 1]),
        low=low,
        high=high,
        verdict=verdict,
        r=float(np.corrcoef(share, effect)[0, 1]),
        slope=slope,
        ceiling=ceiling,
        predicted=kept["predicted"],
        measured=kept["measured"],
        total=share.sum(),
        effects=effect.sum(),
        counting=min(g["counting"] for g in kept["groups"]),
        lines="\n".join(lines),
    )


_TEXT = """# A ledger's shares beside runs without the group

`python benchmarks/ledger_check.py run` (rows beside this page). The [small policy](../../probe_replay/small_policy.py), all
weights trained, steps {first} to {last} of its run; {groups} groups of training prompts, each left out of all these steps,
which are then taken again. Shares: of the [ledger](../../../docs/analyses/ledger.md). *Effect*: entropy with the group less
without it, at the end, on the same 2048 sequences.

**Linear datamodelling score** (rank correlation of share and effect over groups): **{score:.2f} [{low:.2f}, {high:.2f}]** (95%
interval, which {verdict}). Correlation {r:.2f}; slope of effect on share {slope:.2f}; the effects' own errors would let a perfect
prediction reach {ceiling:.2f}. Shares of all groups add up to {total:+.4f} nats per token, effects to {effects:+.4f}; the run's
whole change was predicted as {predicted:+.4f} and measured as {measured:+.4f}. At least {counting:.0%} of the sequences count.

| group | share | effect | its error |
|---|---|---|---|
{lines}
"""


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments[:1] == ["run"] and len(arguments) <= 2:
        if not run_all(float(arguments[1]) if len(arguments) == 2 else np.inf):
            raise SystemExit("not all runs are there yet: call it again")
    elif arguments != ["page"]:
        raise SystemExit("usage: ledger_check.py run [SECONDS] | page")
    write_whole(RESULTS / "README.md", page())
    print(page().split("\n| group")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
