"""Every function of the packages that makes an error, an interval, a p-value or a decision by one.

A maker is a function of the statistics modules, a jackknife, or a quantile of Student's t or of replicates; a site is a function
of the packages that calls one or that writes a p-value.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HOMES = {
    "rl_training.intervals": {"interval", "t_quantile", "correlation_interval"},
    "entropy_experiments.statistics.agreement": {"compare", "paired_agreement", "unpaired_agreement", "told_from_zero"},
    "entropy_experiments.statistics.correlation": {"correlation"},
    "entropy_experiments.statistics.jackknife_interval": {"jackknife_interval", "ends_of"},
    "entropy_experiments.statistics.largest_part": {"largest_part"},
    "entropy_experiments.statistics.series_regression": {"fit_series"},
    "entropy_experiments.records.estimate_entries": {
        "interval_estimate",
        "ratio_estimate",
        "stored_estimate",
        "stored_measurement",
    },
    "entropy_core.uncertainty": {"jackknife_standard_error", "jackknife_over_prompts"},
    "entropy_core.fold_gradients": {"fold_estimate"},
    "rl_training.probe.history": {"error_of_sum"},
}
"""Module -> makers that are imported from it."""
QUANTILES = {"ppf", "quantile", "percentile", "nanquantile"}
ROOT = Path(__file__).resolve().parents[1]


def sites() -> set[str]:
    """``differences._number``, ... of all three packages: file and function, so that a move between folders changes nothing."""
    found = set()
    for package in ("entropy_core", "rl_training", "entropy_experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            makers = {alias.asname or alias.name for alias in _imported(tree, module)} | HOMES.get(module, set())
            for function in _functions(tree):
                if _calls(function) & (makers | QUANTILES) or _writes_p_value(function):
                    found.add(f"{path.stem}.{function.name}")
    return found


def _imported(tree: ast.Module, module: str) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in HOMES and node.module != module:
            yield from (alias for alias in node.names if alias.name in HOMES[node.module])


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Those of the module and of its classes; what they define inside counts as theirs."""
    for node in tree.body:
        for inner in [node, *getattr(node, "body", [])] if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                yield inner


def _calls(function: ast.FunctionDef) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {getattr(call, "id", getattr(call, "attr", "")) for call in calls}


def _writes_p_value(function: ast.FunctionDef) -> bool:
    keys = [key for node in ast.walk(function) if isinstance(node, ast.Dict) for key in node.keys]
    return any(isinstance(key, ast.Constant) and key.value == "p_value" for key in keys)
