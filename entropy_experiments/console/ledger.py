"""`ledger` on the command line: its options, and the lines it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entropy_experiments.text.display import PromptFrame, prompt_frame, quoted, visible

if TYPE_CHECKING:
    from entropy_experiments.records.ledger_record import Ledger, LedgerRow

_MEANING = (
    "The accounting share of a group of training sequences is what it did to entropy at the steps that it was in and, through "
    "momentum, at later ones; below 0: it lowered entropy. The first list adds up to the predicted change. The others divide "
    "what the training sequences did, without momentum from before and weight decay. Shares rank groups; they do not say what a "
    "run without one would have done."
)


def ledger(
    run: Annotated[Path, typer.Argument(help="Run folder: its checkpoints and its recorded sequences")],
    sequences: Annotated[
        int, typer.Option("--sequences", min=2, help="Held-out prompts that entropy is taken on")
    ] = 64,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Stop at the checkpoint of this step")] = None,
    device: Annotated[str, typer.Option("--device", help="Where to recompute: auto, cpu, cuda")] = "auto",
    trust: Annotated[
        bool,
        typer.Option("--trust", help="You trust who made the run: its task may open files, import and evaluate"),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the terminal")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as one JSON object")] = False,
) -> None:
    """Whose entropy was it, over all recorded steps: shares by kind of sequence, by token and by prompt."""
    from entropy_experiments.run.quiet_libraries import quiet_libraries, stdout_kept_for_results

    with stdout_kept_for_results():
        quiet_libraries()
        from entropy_experiments.console.progress import StageProgress, progress_console
        from entropy_experiments.ledger.ledger import run_ledger

        with StageProgress(progress_console(quiet), {"steps": 1.0}, label="ledger") as progress:
            found = run_ledger(run, sequences, device, trust, last=last, reporter=progress)
    if as_json:
        from entropy_experiments.records.record import json_of

        print(json.dumps({"command": "ledger", **json_of(found)}, allow_nan=False))
    else:
        print(visible("\n".join(ledger_lines(found))))


def ledger_lines(found: Ledger) -> list[str]:
    """The ledger as plain lines."""
    from entropy_experiments.ledger.partitions import RIGHT_FROM
    from entropy_experiments.statistics.confidence import BRACKETS, few_prompts_sentence

    steps = f"Steps {found.first_step} to {found.last_step}"
    lines = [
        f"{steps}: entropy was predicted to change by {found.predicted.shown()} nats per token; measured on fresh completions "
        f"was {found.measured.shown()} ({BRACKETS}, over {found.eval_sequences} held-out prompts). "
        f"{_agreement(found)}"
    ]
    freedoms = {"predicted": found.predicted.degrees_of_freedom, "measured": found.measured.degrees_of_freedom}
    if warning := few_prompts_sentence(found.eval_sequences, freedoms):
        lines.append(warning)
    kinds = (
        f"  right: ended, with a reward of {RIGHT_FROM:g} or more; wrong: ended with less, or without a reward; cut off: reached "
        f"the longest completion before its end; momentum from before: what steps up to {found.first_step - 1} left in it"
    )
    lines += ["", _MEANING]
    for heading, rows, explained in (
        ("By kind of training sequence", found.by_kind, [kinds]),
        ("By token of all training sequences", found.by_token, []),
        (f"By prompt, of {found.prompts} trained on, the largest first", found.by_prompt, []),
    ):
        frame = prompt_frame([row.name for row in rows if row.prompt_index is not None])
        lines += ["", f"{heading} (accounting shares, nats per token):", *explained, *(_line(r, frame) for r in rows)]
    return lines


def _agreement(found: Ledger) -> str:
    """Whether prediction and measurement agree, by their difference with each prompt left out of both."""
    from entropy_experiments.statistics.confidence import AGREE, UNTOLD, agreement_sentence

    compared = None if found.agreement is None else found.agreement.known()
    if compared is None or found.measured.value is None:
        return f"Whether they {AGREE} {UNTOLD}: the difference has no error, since it is not known prompt by prompt."
    return agreement_sentence(compared, found.measured.value)


def _line(row: LedgerRow, frame: PromptFrame) -> str:
    """A training prompt by its number and what it does not share with the others listed."""
    name = row.name
    if row.prompt_index is not None:
        name = f"prompt {row.prompt_index}, {quoted(frame.own_part(row.name), keep='both')}"
    return f"  {name}: {row.share.shown()}"
