"""Conformal risk control along a path on which single rows get better again."""

import numpy as np

from hf_earlyexit.calibration.certify import Certified, walk_of_rows
from hf_earlyexit.calibration.risks import Losses


def test_a_loss_once_seen_along_the_path_stays():
    # Thresholds fall from "closed" over .7 to .4. Rows 0-7 err at exit 2, where .7 lets them go, and are right at exit 1,
    # where .4 does; rows 8-15 err at exit 1. At .4 eight rows err, but sixteen have on the way: (16 + 1) / 101 > .1.
    scores, losses = np.full((100, 3), 0.1), np.zeros((100, 3))
    scores[:16, 0] = 0.5
    scores[:8, 1], losses[:8, 1], losses[8:16, 0] = 0.8, 1.0, 1.0
    path = np.array([[np.nan, np.nan], [0.7, 0.7], [0.4, 0.4]])
    target, everybody = Certified(0.1, procedure="crc"), {"all rows": np.ones(100, dtype=bool)}
    walk = walk_of_rows(target, Losses(losses, 0.0, 1.0), scores, path, everybody, (scores, losses))
    assert [walk.along.at(place).sum() for place in range(3)] == [0, 8, 8]
    assert walk.last_certified() == 1


def test_the_row_to_come_counts_as_lost():
    # ten of a hundred rows err: 10 / 100 is within .1, (10 + 1) / 101 is not; with nine, (9 + 1) / 101 is
    everybody, path = {"all rows": np.ones(100, dtype=bool)}, np.array([[np.nan], [0.5]])
    for wrong, kept in ((10, 0), (9, 1)):
        losses = np.zeros((100, 2))
        losses[:wrong, 0] = 1.0
        scores = np.full((100, 2), 0.8)
        walk = walk_of_rows(
            Certified(0.1, procedure="crc"), Losses(losses, 0.0, 1.0), scores, path, everybody, (scores, losses)
        )
        assert walk.last_certified() == kept
