"""A checkpoint's record knows its own digest: one changed digit of it would be another step."""

import json
import re

import pytest

from rl_training.errors import UserError
from rl_training.run.sidecar import SIDECAR_NAME, read_sidecar, write_sidecar
from rl_training.train import run_training
from tests.tiny_policy import save_tiny_policy, tiny_train_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sidecar")
    config = tiny_train_config(
        save_tiny_policy(folder / "policy"), folder / "run", training={"steps": 1, "save_every": 1}
    )
    return run_training(config, quiet=True) / "checkpoint-1"


@pytest.fixture
def written(checkpoint):
    """Its text; it is put back afterwards."""
    text = (checkpoint / SIDECAR_NAME).read_text()
    yield text
    (checkpoint / SIDECAR_NAME).write_text(text)


def test_every_changed_digit_is_seen(checkpoint, written):
    digits = [place.start() for place in re.finditer(r"\d", written.rsplit("own_sha256", 1)[0])]
    assert len(digits) > 300
    for place in digits[:: len(digits) // 40]:
        other = str((int(written[place]) + 1) % 10)
        (checkpoint / SIDECAR_NAME).write_text(written[:place] + other + written[place + 1 :])
        with pytest.raises(UserError) as refusal:
            read_sidecar(checkpoint)
        assert "\n" not in str(refusal.value)


def test_layout_and_order_are_not_its_content(checkpoint, written):
    known = read_sidecar(checkpoint)
    content = json.loads(written)
    (checkpoint / SIDECAR_NAME).write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert read_sidecar(checkpoint) == known
    write_sidecar(checkpoint, known)
    assert read_sidecar(checkpoint) == known


def test_who_changes_it_takes_the_digest_away(checkpoint, written):
    content = json.loads(written) | {"learning_rates_used": [0.25]}
    (checkpoint / SIDECAR_NAME).write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="own_sha256.*: it is damaged.*or, if you changed it, delete its line own_sha256"
    ):
        read_sidecar(checkpoint)
    del content["own_sha256"]
    (checkpoint / SIDECAR_NAME).write_text(json.dumps(content))
    changed = read_sidecar(checkpoint)
    assert changed is not None and changed.learning_rates_used == [0.25]
