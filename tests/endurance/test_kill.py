"""A few kills: everything ends as if there had been none."""

from pathlib import Path

import numpy as np
from kill import check, differences, draw
from lives import Life


def test_moments_fall_over_the_whole_time_of_every_command():
    whole = Life(Path("whole"), seconds={"encode": 2.0, "fit": 8.0, "evaluate": 1.0, "predict": 1.0})
    rng = np.random.default_rng(0)
    found = {name: [] for name in whole.seconds}
    for _ in range(300):
        for name, moments in draw(rng, whole, 5).items():
            found[name] += moments
    for name, moments in found.items():
        shares = np.array(moments) / whole.seconds[name]
        assert shares.min() < 0.05
        assert 1.0 < shares.max() <= 1.1
        assert 0.45 < np.median(shares) < 0.85


def test_a_difference_or_a_stray_file_is_noticed(tmp_path):
    lives = []
    for name in ("whole", "same", "other", "stray"):
        (tmp_path / name / "run").mkdir(parents=True)
        lives.append(Life(tmp_path / name, outcomes={"fit": {"weights": "1"}}))
    whole, same, other, stray = lives
    other.outcomes = {"fit": {"weights": "2"}}
    (stray.folder / "run" / ".left.tmp").touch()
    assert differences(same, whole) == []
    assert "weights" in differences(other, whole)[0]
    assert ".left.tmp" in differences(stray, whole)[0]


def test_killed_lives_end_like_whole_ones(tmp_path):
    hit, violations, _ = check(tmp_path, kills=4, rows=1500, seed=3)
    assert not violations, "\n".join(violations)
    assert hit.total() >= 4
