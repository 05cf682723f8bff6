"""Numbers beside points: none covers another or a point, however close the points lie."""

import numpy as np

from entropy_experiments.report.figures.labels import offsets


def test_numbers_of_close_points_do_not_cover_one_another():
    points = np.random.default_rng(0).normal(100.0, 8.0, (27, 2))
    texts = [str(k) for k in range(1, 28)]
    middles = points + offsets(points, texts)
    for i in range(27):
        assert (np.abs(points - middles[i]) > 4.0).any(1).all(), "a number over a point"
        for j in range(i):
            across, down = np.abs(middles[i] - middles[j])
            assert down >= 7.99 or across >= 5.19, f"numbers {i + 1} and {j + 1}"


def test_a_point_of_its_own_keeps_its_number_beside_it():
    near = np.hypot(*offsets(np.array([[0.0, 0.0], [300.0, 0.0]]), ["1", "12"]).T)
    assert (near <= 13).all()
