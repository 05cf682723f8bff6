"""Does a ledger's share foretell what a run without that group does? Each is left out of the recorded steps, all taken again.

    python -m benchmarks.ledger_check small      the small policy's run (price_check), its ledger, and 20 runs of 20 steps
    python -m benchmarks.ledger_check smollm2    a run of SmolLM2-135M on the demo's task, its ledger, and 4 runs of 8 steps
    python -m benchmarks.ledger_check page       the tables, from the rows under benchmarks/results/ledger/

What is there is not made again.

    share_G     sum of the ledger's shares of the group's training prompts, nats per token
    effect_G    h at the end of the steps as recorded less h at the end of the same steps without the group's sequences

Groups are the training prompts by number, modulo their count. Without a group the other sequences keep their weights;
clipping, both moments and P answer at every step. Nothing is drawn anew: sequences are those of the record, so the effect is
of training on the group and not of what another policy would have drawn. Both ends are measured on the same sequences, drawn
at the end of the full run. The linear datamodelling score (Park et al. 2023) of single groups left out is the rank
correlation of shares and effects.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.price_check import CONFIG, small_run
from entropy_core.directional import weights_moved
from entropy_core.entropy import effective_sample_size, normalized_weights
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.interventions import loss_coefficients
from entropy_core.measurement import snis_entropy_change
from entropy_core.scores import token_statistics
from entropy_experiments.ledger.ledger import run_ledger
from entropy_experiments.ledger.run_again import RunAgain
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.files import write_whole
from rl_training.intervals import correlation_interval
from rl_training.sampling import draw
from rl_training.train import run_training

RESULTS, ROOT = Path(__file__).parent / "results" / "ledger", Path("runs/ledger_check")


def smollm2_run(steps: int) -> Path:
    """SmolLM2-135M on the demo's task with a checkpoint at each step; one that is there is left alone."""
    folder = ROOT / "smollm2-run"
    if (folder / f"checkpoint-{steps}").exists():
        return folder
    overrides = (
        f"training.steps={steps}",
        "training.save_every=1",
        "training.report_to=[]",
        "entropy_probe.enabled=false",
        "training_buffer.max_refill_rounds=0",
    )
    config = load_config(
        TrainConfig, CONFIG, [*overrides, "optimizer.learning_rate=3e-4", f"training.output_dir={folder}"]
    )
    return run_training(config, True, False)


@dataclass(frozen=True)
class Check:
    """Groups left out of the steps after `first`.

    Attributes:
        sequences: that the ledger's gradients are taken on, a step.
        prompts, each: held-out prompts and completions of each that effects are measured on.
    """

    name: str
    run: Callable[[], Path]
    groups: int
    first: int
    steps: int
    sequences: int
    prompts: int
    each: int

    @property
    def last(self) -> int:
        """Number of the last step that is taken."""
        return self.first + self.steps

    @property
    def folder(self) -> Path:
        """Where runs and shares are kept while some are missing."""
        return ROOT / self.name


CHECKS = {
    check.name: check
    for check in (
        Check("small", small_run, groups=20, first=1, steps=20, sequences=512, prompts=2048, each=1),
        Check("smollm2", lambda: smollm2_run(9), groups=4, first=1, steps=8, sequences=64, prompts=64, each=4),
    )
}


def weights_at_the_end(check: Check, left_out: int | None) -> dict[str, Tensor]:
    """Trained weights after the recorded steps without one group."""
    again = RunAgain(check.run(), "cpu", True, check.last, check.first)
    for number in range(check.first + 1, check.last + 1):
        rollouts, batch, weights = again.sequences(number)
        group = torch.tensor([-1 if s.prompt_index is None else s.prompt_index % check.groups for s in rollouts])
        weights = torch.where(group == left_out, 0.0, weights) if left_out is not None else weights
        loss = loss_coefficients(weights, batch, weights).scaled(-1.0)
        gradient = batch_gradients(again.model, batch, [loss], again.passes, as_trained=True)[0]
        again.advance(again.next_step(gradient, number))
    return {name: p.detach().clone() for name, p in trainable_parameters(again.model).items()}


def shares(check: Check) -> dict[str, Any]:
    """The ledger's share of each group, and what its whole says."""
    ledger = run_ledger(check.run(), check.sequences, "cpu", True, check.last, named_prompts=10**6)
    found = [0.0] * check.groups
    for row in ledger.by_prompt:
        if row.prompt_index is not None and row.share.value is not None:
            found[row.prompt_index % check.groups] += row.share.value
    return {"shares": found, "predicted": ledger.predicted.value, "measured": ledger.measured.value}


def run_all(check: Check, seconds: float) -> bool:
    """Whatever is missing, until the time is over; whether all is there."""
    begun, folder = time.monotonic(), check.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (whole := folder / "whole.pt").exists():
        torch.save(weights_at_the_end(check, None), whole)
    if not (folder / "shares.json").exists():
        write_whole(folder / "shares.json", json.dumps(shares(check)))
    for group in range(check.groups):
        if (path := folder / f"without-{group}.pt").exists():
            continue
        if time.monotonic() - begun > seconds:
            return False
        torch.save(weights_at_the_end(check, group), path)
        print(f"without group {group}: done", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / f"{check.name}.json", json.dumps(rows(check), indent=1) + "\n")
    return True


def rows(check: Check) -> dict[str, Any]:
    """Shares, effects with their errors, and how many of the sequences count."""
    again = RunAgain(check.run(), "cpu", True, check.last, check.first)
    model, sampling, whole = again.model, again.plan.sampling_config, torch.load(check.folder / "whole.pt")
    here = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}

    def moved(to: dict[str, Tensor]) -> Any:
        return weights_moved(model, {name: to[name] - here[name] for name in here}, 1.0)

    found = []
    with moved(whole):
        prompts, coder = again.plan.task.heldout[: check.prompts], again.checkpoint.tokenizer
        batch = draw(model, coder, prompts, check.each, sampling, 1, "evaluation").to_batch(sampling)
        before = token_statistics(model, batch, again.passes)
    for group in range(check.groups):
        with moved(torch.load(check.folder / f"without-{group}.pt")):
            after = token_statistics(model, batch, again.passes)
        change = snis_entropy_change(before, after, batch)
        counting = effective_sample_size(normalized_weights(after.scores() - before.scores())) / len(batch)
        found.append({"effect": -change.change, "error": change.standard_error, "counting": counting})
    measured = {"steps": [check.first + 1, check.last], "sequences": len(batch)}
    return {**json.loads((check.folder / "shares.json").read_text()), "groups": found, **measured}


def page() -> str:
    """The page, from the rows that are kept."""
    found = [(name, RESULTS / f"{name}.json") for name in CHECKS if (RESULTS / f"{name}.json").exists()]
    return _TEXT + "\n".join(section(name, json.loads(path.read_text())) for name, path in found)


def section(name: str, kept: dict[str, Any]) -> str:
    """One check: the score and its interval, and every group."""
    share = np.array(kept["shares"])
    effect, error = (np.array([g[name] for g in kept["groups"]]) for name in ("effect", "error"))
    ranks = [np.argsort(np.argsort(values)) * 1.0 for values in (share, effect)]
    low, high = correlation_interval(*ranks)
    verdict = "excludes 0" if low > 0 or high < 0 else "holds 0: so few groups cannot tell"
    lines = [
        f"| {g} | {s:+.5f} | {e:+.5f} | {se:.5f} |"
        for g, (s, e, se) in enumerate(zip(share, effect, error, strict=True))
    ]
    return _SECTION[name].format(
        groups=len(share),
        sequences=kept["sequences"],
        first=kept["steps"][0],
        last=kept["steps"][1],
        score=float(np.corrcoef(ranks)[0, 1]),
        low=low,
        high=high,
        verdict=verdict,
        r=float(np.corrcoef(share, effect)[0, 1]),
        slope=float(share @ effect / (share @ share)),
        ceiling=np.sqrt(max(0.0, 1 - np.mean(error**2) / effect.var())),
        predicted=kept["predicted"],
        measured=kept["measured"],
        total=share.sum(),
        effects=effect.sum(),
        counting=min(g["counting"] for g in kept["groups"]),
    ) + _TABLE.format(lines="\n".join(lines))


_TEXT = """# A ledger's shares beside runs without the group

`python -m benchmarks.ledger_check small` and `... smollm2` (rows beside this page). Groups of training prompts are left out
of all recorded steps, which are then taken again. Shares: of the [ledger](../../../docs/analyses/ledger.md). *Effect*:
entropy with the group less without it, at the end, on the same sequences. *Score*: the linear datamodelling score, the rank
correlation of share and effect over groups.

"""
_SECTION = {
    "small": """## The small policy

The [small policy](../../probe_replay/small_policy.py), all weights trained, steps {first} to {last} of its run; {groups} groups,
effects on {sequences} sequences.

**Score: {score:.2f} [{low:.2f}, {high:.2f}]** (95% interval, which {verdict}). Correlation {r:.2f}; slope of effect on share
{slope:.2f}; the effects' own errors would let a perfect prediction reach {ceiling:.2f}. Shares of all groups add up to
{total:+.4f} nats per token, effects to {effects:+.4f}; the run's whole change was predicted as {predicted:+.4f} and measured as
{measured:+.4f}. At least {counting:.0%} of the sequences count.
""",
    "smollm2": """## SmolLM2-135M

LoRA on the demo's task, steps {first} to {last}; {groups} groups, effects on {sequences} sequences.

**Score: {score:.2f} [{low:.2f}, {high:.2f}]** (95% interval, which {verdict}). Slope of effect on share {slope:.2f}. Shares of
all groups add up to {total:+.3f} nats per token, effects to {effects:+.3f}; the run's whole change was predicted as
{predicted:+.3f} and measured as {measured:+.3f}. At least {counting:.0%} of the sequences count.
""",
}
_TABLE = """
| group | share | effect | its error |
|---|---|---|---|
{lines}
"""


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    if arguments[:1] and arguments[0] in CHECKS and len(arguments) <= 2:
        if not run_all(CHECKS[arguments[0]], float(arguments[1]) if len(arguments) == 2 else np.inf):
            raise SystemExit("not all runs are there yet: call it again")
    elif arguments != ["page"]:
        raise SystemExit(f"usage: ledger_check.py {' | '.join(CHECKS)} [SECONDS] | page")
    write_whole(RESULTS / "README.md", page())
    print(page().split("\n| group")[0])


if __name__ == "__main__":
    main(sys.argv[1:])
