import pytest

from tests.shared_artefacts import made_once
from tests.tiny_policy import save_tiny_policy


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory):
    """A folder with the policy of tests/tiny_policy.py; not to be changed."""
    return made_once(tmp_path_factory, "tiny_policy", lambda root: save_tiny_policy(root / "policy"))
