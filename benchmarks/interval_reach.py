"""Makes the table of entropy_experiments/statistics/reach_table.py: how far an interval reaches, at the skewness that was seen.

    python benchmarks/interval_reach.py            one minute of one core; writes the table and prints the coverage of each law

Let x be B draws of a law, t their mean, se its jackknife error, g = skewness/sqrt(B) their scaled skewness, z = (truth - t)/se.
An interval is a function u(B, g): it reaches from t - u(B, -g) se to t + u(B, g) se. Of all such functions that are nowhere
shorter than Student's, the table holds the one that minimises the mean length over the laws below, subject to a coverage of at
least `floor(B)` for each of them: the minimum of

    sum over laws of (mean length)  +  sum over laws lambda_k * (share of draws that are missed)

over u, bin of g by bin of g, with multipliers lambda_k raised where a law is covered too little (dual ascent). Laws: symmetric
(normal, uniform, t with 5 and 3 degrees), skewed (gamma, lognormal), and a change that 5 of the B prompts carry on average. None
is taken from the worlds of benchmarks/calibration.py, where the table is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from entropy_experiments.statistics.jackknife_interval import sample_skewness

COUNTS = (4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128, 256)
KNOTS = np.array([-1, -0.8, -0.6, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0])
DRAWS, BLOCK, STEPS = 60_000, 10_000, 300
LARGEST = 40.0
RESULT = Path("entropy_experiments/statistics/reach_table.py")

Law = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def carried_by(prompts: float, spread: float) -> Law:
    """Draws of normal noise to which on average `prompts` of B add an exponential; mean 0."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        chance = min(prompts / shape[1], 0.5)
        jumps = (rng.random(shape) < chance) * rng.exponential(size=shape)
        return spread * rng.normal(size=shape) + jumps - chance

    return draw


def gamma(shape: float) -> Law:
    return lambda rng, size: rng.gamma(shape, size=size) - shape


def lognormal(sigma: float) -> Law:
    return lambda rng, size: rng.lognormal(sigma=sigma, size=size) - np.exp(sigma**2 / 2)


ORDINARY: dict[str, Law] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "uniform": lambda rng, size: rng.random(size) - 0.5,
    "t, 5 degrees": lambda rng, size: rng.standard_t(5, size=size),
    "t, 3 degrees": lambda rng, size: rng.standard_t(3, size=size),
    "gamma 4": gamma(4),
    "gamma 2": gamma(2),
    "exponential": gamma(1),
    "gamma 1/2": gamma(0.5),
    "lognormal 1/2": lognormal(0.5),
}
HEAVY: dict[str, Law] = {
    "lognormal 1": lognormal(1.0),
    "carried by 5, noise 0.3": carried_by(5, 0.3),
    "gamma 1/4": gamma(0.25),
    "carried by 5, noise 0.1": carried_by(5, 0.1),
}
"""Skewness 4 and more: the last two only from 12 draws on, since fewer cannot tell them from laws without a tail."""


def floors(count: int) -> dict[str, float]:
    """The least coverage of each law at this number of draws; laws that are not named have none."""
    if count < 8:
        return dict.fromkeys(ORDINARY, {4: 0.91, 5: 0.915, 6: 0.92}[count])
    heavy = {8: 0.91, 10: 0.91, 12: 0.915, 16: 0.925}.get(count, 0.93)
    return dict.fromkeys(ORDINARY, 0.94 if count < 24 else 0.93) | dict.fromkeys(
        list(HEAVY)[: 2 if count < 12 else 4], heavy
    )


def simulate(count: int, law: Law, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(z, g, se over its median), (2 DRAWS,) each: every draw and its mirror image."""
    parts = []
    for _ in range(DRAWS // BLOCK):
        x = law(rng, (BLOCK, count))
        error = x.std(axis=1, ddof=1) / count**0.5
        parts.append((-x.mean(1) / error, sample_skewness(x) / count**0.5, error))
    z, g, error = (np.concatenate(column) for column in zip(*parts, strict=True))
    error = np.minimum(error / np.median(error), 4.0)
    return np.r_[z, -z], np.r_[g, -g], np.r_[error, error]


def reach(count: int) -> tuple[np.ndarray, dict[str, float]]:
    """(u at KNOTS, coverage of every law) at this number of draws."""
    laws, rng, least = ORDINARY | HEAVY, np.random.default_rng(count), floors(count)
    student = stdtrit(count - 1, 0.975)
    candidates = np.r_[student, np.geomspace(1.02 * student, LARGEST, 260)]
    sides = [simulate(count, law, rng) for law in laws.values()]
    # missed[bin, law, candidate]: the share of draws in a bin whose truth lies beyond the candidate. Bins overlap as the hat
    # functions of linear interpolation do.
    missed, length = np.zeros((len(KNOTS), len(laws), len(candidates))), np.zeros(len(KNOTS))
    for number, (z, g, error) in enumerate(sides):
        for b in range(len(KNOTS)):
            hat = np.interp(np.clip(g, -1, 1), KNOTS, np.eye(len(KNOTS))[b])
            inside = hat > 0
            order = np.argsort(z[inside])
            weights = np.r_[0.0, np.cumsum(hat[inside][order])]
            places = np.searchsorted(z[inside][order], candidates, side="right")
            missed[b, number] = (weights[-1] - weights[places]) / len(z)
            length[b] += float(hat @ error) / len(z) / len(laws)
    wanted = np.array([least.get(name, 0.0) for name in laws])
    price = np.where(wanted > 0, 0.2, 0.0)
    for step in range(STEPS):
        chosen = (length[:, None] * candidates + np.einsum("k,bku->bu", price, missed)).argmin(1)
        coverage = 1 - 2 * missed[np.arange(len(KNOTS)), :, chosen].sum(0)
        move = np.clip(60 * (wanted - coverage) / np.sqrt(1 + step / 20), -0.5, 0.5)
        price = np.where(wanted > 0, np.maximum(price * np.exp(move), 1e-3), 0.0)
    found = candidates[chosen]
    held = {}
    for name, (z, g, _) in zip(laws, sides, strict=True):
        high, low = (np.interp(np.clip(sign * g, -1, 1), KNOTS, found) for sign in (1, -1))
        held[name] = float(((-low <= z) & (z <= high)).mean())
    return found, held


def main() -> None:
    rows = []
    for count in COUNTS:
        found, held = reach(count)
        rows.append(found)
        print(count, {name: round(100 * rate, 1) for name, rate in held.items()}, np.round(found, 2), flush=True)
    body = "\n".join(f"    ({', '.join(f'{u:.3f}' for u in row)},)," for row in rows).replace(",),", "),")
    RESULT.write_text(
        '"""How many standard errors a 95% interval reaches on the side of the skewness that was seen.\n\n'
        "Made by `python benchmarks/interval_reach.py`, which says what it is; read by .jackknife_interval. Not edited by hand.\n"
        '"""\n\n'
        f"COUNTS = {COUNTS}\n"
        '"""Draws behind the estimate: the rows of REACH."""\n\n'
        f"KNOTS = ({', '.join(f'{k:g}' for k in KNOTS)})\n"
        '"""Skewness over the square root of their number: the columns of REACH."""\n\n'
        f"# fmt: off\nREACH = (\n{body}\n)\n# fmt: on\n"
    )


if __name__ == "__main__":
    main()
