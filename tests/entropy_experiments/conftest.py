"""One tiny training run for all tests of Tier 2; tests that damage a checkpoint work on a copy."""

import json
import shutil

import pytest
from playwright.sync_api import sync_playwright

from entropy_experiments.buffers import recorded_task
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.report.page import write_report
from rl_training.train import run_training
from tests.entropy_experiments.browser_visit import launch
from tests.entropy_experiments.results_fixture import build_results
from tests.entropy_experiments.small_analysis import config, whole_config
from tests.shared_artefacts import made_once
from tests.tiny_policy import save_tiny_policy, tiny_train_config
from tests.unpainted import drawn, paint, paint_nothing, painted


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with checkpoint-2 and checkpoint-4 of ours, its policy beside it; not to be changed. Records are without their
    own digest, as an earlier release's, so that copies can be edited (tests/rl_training/run/test_sidecar.py has the digest).
    """

    def train(root):
        policy = save_tiny_policy(root / "policy")
        config = tiny_train_config(policy, root / "run", training={"steps": 4, "save_every": 2})
        run = run_training(config, quiet=True)
        for record in run.glob("checkpoint-*/entropy_experiments.json"):
            record.write_text(json.dumps(json.loads(record.read_text()) | {"own_sha256": None}))
        return run

    return made_once(tmp_path_factory, "tier2", train)


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


@pytest.fixture(scope="session", autouse=True)
def _unpainted():
    """Analyses of tests draw no figures, and reports do not paint theirs: see `drawn_figures`, `pictures`."""
    paint_nothing()
    yield
    paint()


@pytest.fixture(scope="module")
def drawn_figures():
    """Analyses draw their figures."""
    with drawn():
        yield


@pytest.fixture(scope="module")
def pictures():
    """Reports are painted."""
    with painted():
        yield


@pytest.fixture(scope="module")
def small_analysis(tiny_run, _trust_in_rewards_of_the_tests, tmp_path_factory):
    """The analysis of `small_analysis.config()`; its folder is not to be changed."""
    return _analysed(tiny_run, tmp_path_factory, "small", config())


@pytest.fixture(scope="module")
def step_analysis(tiny_run, _trust_in_rewards_of_the_tests, tmp_path_factory):
    """The same with the P of the step itself."""
    step_p = config("entropy_analysis.fisher_kernel.preconditioning=step")
    return _analysed(tiny_run, tmp_path_factory, "step", step_p)


@pytest.fixture(scope="module")
def whole_analysis(tiny_run, _trust_in_rewards_of_the_tests, tmp_path_factory):
    """Every analysis, as configured by default, with its pictures."""
    with painted():
        return _analysed(tiny_run, tmp_path_factory, "whole", whole_config())


def _analysed(run, tmp_path_factory, name, settings):
    return made_once(
        tmp_path_factory,
        f"analysis-{name}",
        lambda root: run_fisher_analysis(run, settings, folder=root / name),
    )


@pytest.fixture
def checkpoint_copy(tiny_run, tmp_path):
    """A copy of the last checkpoint, free to be damaged."""
    target = tmp_path / "copied_run" / "checkpoint-4"
    shutil.copytree(tiny_run / "checkpoint-4", target)
    return target


@pytest.fixture(scope="session")
def whole_report(tmp_path_factory):
    """A synthetic results folder with every analysis, its pictures and its report; not to be changed."""

    def build(root):
        folder = build_results(root / "results", analyses=True)
        write_report(folder)
        return folder

    with painted():
        return made_once(tmp_path_factory, "whole_report", build)


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
