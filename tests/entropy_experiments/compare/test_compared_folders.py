"""Which folders are one model's, and two comparisons that would be written into one folder."""

import pytest

from entropy_experiments.compare.page import write_comparison
from entropy_experiments.compare.sides import caveats, open_sides
from rl_training.errors import UserError
from rl_training.run.folder_lock import locked
from tests.entropy_experiments.comparison_fixture import build_side, edit_summary


@pytest.fixture
def pair(tmp_path):
    """Two analyses on the same prompts."""
    return build_side(tmp_path / "a", 1), build_side(tmp_path / "b", 2)


def caveats_of(*folders):
    sides = open_sides(folders)
    return " ".join(caveats(sides, [side.first for side in sides]))


def test_a_second_comparison_into_one_folder_is_refused_while_the_first_is_written(pair, tmp_path):
    with locked(tmp_path / ".out.lock", "x"), pytest.raises(UserError, match=r"out is in use by process \d+"):
        write_comparison(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_comparison(pair, tmp_path / "out")
    assert not list(tmp_path.glob(".out*")), "nothing is left beside it"


def test_two_checkpoints_of_a_whole_model_are_one_model(pair):
    """A fully fine-tuned policy is named by its checkpoint's path."""

    def named(size: int):
        def change(summary):
            summary["checkpoint"]["model"] = summary["checkpoint"]["path"]
            summary["kernel_modules"]["trainable"] = size

        return change

    for folder in pair:
        edit_summary(folder, named(1000))
    assert "Different models" not in caveats_of(*pair)
    edit_summary(pair[1], named(2000))
    assert "A a whole model of 1,000 trained parameters, B a whole model of 2,000" in caveats_of(*pair)
