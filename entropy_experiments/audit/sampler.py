"""Whether completions come from the softmax they are scored by: their own account, and what the
generator said of them.
"""

from __future__ import annotations

import math

import numpy as np

from entropy_experiments.audit.causes import Window
from entropy_experiments.audit.logged_values import LoggedRow
from entropy_experiments.audit.policies import Policies
from entropy_experiments.audit.recorded_run import RecordedRun, Sequence
from entropy_experiments.audit.token_definitions import TokenDefinition, TokenMeans
from entropy_experiments.audit.verdicts import DIFFERS, Finding
from rl_training.probe.surprisal import SurprisalCheck

SAMPLER_DEFINITION = TokenDefinition("surprisal", sequences="generated", average="tokens")
SAMPLER_METRIC = "surprisal by the sampler's own log-probabilities"
# An engine of its own (vLLM) computes in half precision by other kernels: nats per token that this
# explains.
_OTHER_ENGINE = 5e-3


def check_sampler(run: RecordedRun, policies: Policies, rows: list[LoggedRow]) -> tuple[list[Finding], list[str]]:
    """(a finding where the tokens do not follow the softmax, notes).

    Surprisal and entropy of drawn tokens have the same mean where they do
    (rl_training.probe.surprisal).
    """
    check, surprisal, entropy = SurprisalCheck(), 0.0, 0.0
    for step in sorted({step for row in rows for step in row.steps}):
        drawn = [s for generated in run.record(step).rounds for s in generated]
        # One value for one sequence of the run: the same tokens twice are drawn twice.
        for s, values in zip(drawn, policies.values(step - 1, "run", run.settings.temperature, drawn), strict=True):
            at = len(s.prompt_ids) + np.flatnonzero(np.asarray(s.mask, dtype=bool))
            x = -values.logprob[at] - values.entropy[at]
            check.add(float(x.sum()), float((x**2 / 3 + 2 * values.variance[at] / 3).sum()), len(at))
            surprisal, entropy = surprisal - float(values.logprob[at].sum()), entropy + float(values.entropy[at].sum())
    notes = []
    if run.settings.sampler_departures:
        notes.append(
            "the generator's settings depart from softmax(logits / temperature): "
            + ", ".join(run.settings.sampler_departures)
        )
    if not check.tokens:
        return [], notes
    if not check.alarmed:
        notes.append(
            f"surprisal less entropy of the {check.tokens} drawn tokens is {check.difference / check.tokens:+.3g} nats a token "
            f"(z = {check.z:+.1f}): no sign that they were drawn from another distribution than they are scored by"
        )
        return [], notes
    first, last = rows[0].first, rows[-1].step
    scale = 1 / check.tokens
    tolerance = check.limit() * scale
    why = f"completions were not drawn from the distribution whose entropy is logged: {check.sentence()}"
    return [
        Finding("surprisal against entropy", first, last, surprisal * scale, entropy * scale, tolerance, DIFFERS, why)
    ], notes


def sampler_windows(run: RecordedRun, means: TokenMeans, rows: list[LoggedRow]) -> list[Window]:
    """Mean surprisal by recorded log-probabilities of the generator, beside the policy's; none
    where it recorded none.
    """
    windows = []
    for row in rows:
        drawn = [s for step in row.steps for generated in run.record(step).rounds for s in generated]
        if not drawn or any(s.sampler_logprobs is None for s in drawn):
            continue
        logged, right = _mean_of_steps(run, row), means.value(SAMPLER_DEFINITION, row.steps)
        if not math.isnan(logged) and not math.isnan(right):
            windows.append(Window(row.steps, logged, right, _OTHER_ENGINE))
    return windows


def _mean_of_steps(run: RecordedRun, row: LoggedRow) -> float:
    """Mean over steps of the mean over drawn tokens, as `TokenMeans` takes it."""
    found = []
    for step in row.steps:
        values = [v for generated in run.record(step).rounds for s in generated for v in _of_drawn(s)]
        if any(v is None for v in values):
            return math.nan
        found += [-sum(v for v in values if v is not None) / len(values)] if values else []
    return float(np.mean(found)) if found else math.nan


def _of_drawn(s: Sequence) -> list[float | None]:
    return [v for v, drawn in zip(s.sampler_logprobs or (), s.mask, strict=True) if drawn]
