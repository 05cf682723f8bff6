"""What holds for every test: no network, two threads, the same random numbers whatever ran before."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

# Before any library reads them: a test that reaches for the network must fail, not download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from tests.durations import recorded_seconds  # noqa: E402
from tests.shared_artefacts import changed_artefacts  # noqa: E402

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

# The same examples in every run, and no verdict on how fast the machine is.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# Other libraries' news about themselves, at every toy model that is built; ours stay visible.
_NOISE = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Quieten what no test of ours can mend."""
    for line in _NOISE:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files go first, so that no process is left alone with one of them at the end."""
    seconds = recorded_seconds()
    items.sort(key=lambda item: -seconds.get(item.path.relative_to(config.rootpath).as_posix(), 3.0))


@pytest.fixture(scope="session", autouse=True)
def _disks_are_not_waited_for() -> Iterator[None]:
    """A killed process loses nothing that it wrote: flushing shows only without power. Tests count and order the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _short_garbage_collections() -> None:
    """Every trainer collects garbage several times: what is there by now (libraries, mostly) is not looked through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _shared_artefacts_stay_as_they_are(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    changed = changed_artefacts(tmp_path_factory)
    assert not changed, f"tests changed what others read: {changed}"
