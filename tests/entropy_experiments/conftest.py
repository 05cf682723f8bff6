"""One tiny training run for all tests of Tier 2; tests that damage a checkpoint work on a copy."""

import shutil

import pytest
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

from entropy_experiments.buffers import recorded_task
from entropy_experiments.report.figures import style
from entropy_experiments.report.page import write_report
from rl_training.train import run_training
from tests.entropy_experiments.browser_visit import launch
from tests.entropy_experiments.results_fixture import build_results
from tests.tiny_policy import save_tiny_policy, tiny_train_config


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with checkpoint-2 and checkpoint-4 of ours, its policy beside it."""
    root = tmp_path_factory.mktemp("tier2")
    policy = save_tiny_policy(root / "policy")
    config = tiny_train_config(policy, root / "run", training={"steps": 4, "save_every": 2})
    return run_training(config, quiet=True)


@pytest.fixture(scope="session", autouse=True)
def _trust_in_rewards_of_the_tests():
    """The tiny run's reward is a function of the tests: analyses in this process trust it as with `--trust`, and no other."""
    why = recorded_task.why_trust_is_needed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            recorded_task,
            "why_trust_is_needed",
            lambda task: None if str(task.get("reward")).startswith("tests.") else why(task),
        )
        yield


@pytest.fixture(scope="module")
def unpainted():
    """Reports draw their figures and do not paint them, half of an analysis' time here: for tests that look at numbers."""
    picture = style.png_bytes(Figure(figsize=(0.1, 0.1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entropy_experiments.report.page.png_bytes", lambda figure: picture)
        yield


@pytest.fixture
def checkpoint_copy(tiny_run, tmp_path):
    """A copy of the last checkpoint, free to be damaged."""
    target = tmp_path / "copied_run" / "checkpoint-4"
    shutil.copytree(tiny_run / "checkpoint-4", target)
    return target


@pytest.fixture(scope="session")
def whole_report(tmp_path_factory):
    """A synthetic results folder with every analysis, its pictures and its report; not to be changed."""
    folder = build_results(tmp_path_factory.mktemp("whole_report") / "results", analyses=True)
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def images(whole_report):
    """Pictures to render other pages with: what they show does not matter there."""
    return {path.stem: (path.read_bytes(), "a picture") for path in sorted((whole_report / "figures").iterdir())}


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. Not for the whole session: while it runs, no other test could have an event loop of its own."""
    with sync_playwright() as playwright:
        chromium = launch(playwright)
        yield chromium
        chromium.close()
