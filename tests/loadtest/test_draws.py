"""Arrivals, users and numbers of candidates follow their laws."""

import numpy as np
import pytest

from mldcn.errors import UserError
from mldcn.loadtest.draws import Candidates, arrivals, zipf


def rng():
    return np.random.default_rng(3)


def test_constant_arrivals_are_evenly_apart():
    times = arrivals("constant", 4, 2.0, rng())
    np.testing.assert_allclose(times, np.arange(8) / 4)


def test_poisson_arrivals_have_rate_and_spread():
    times = arrivals("poisson", 1000, 100.0, rng())
    assert times.min() >= 0
    assert times.max() < 100
    gaps = np.diff(times)
    assert len(times) == pytest.approx(100_000, rel=0.02)
    # Gaps of a Poisson process are exponential: their deviation is their mean, and 63 % are below it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.02)
    assert (gaps < gaps.mean()).mean() == pytest.approx(1 - np.exp(-1), abs=0.01)
    assert arrivals("poisson", 0.001, 1.0, rng()).size == 0


def test_users_come_by_zipfs_law():
    drawn = zipf(1000, 1.2, 200_000, rng())
    assert drawn.min() == 0
    assert drawn.max() <= 999
    counts = np.bincount(drawn, minlength=1000) / len(drawn)
    expected = np.arange(1, 1001) ** -1.2
    np.testing.assert_allclose(counts[:10], (expected / expected.sum())[:10], rtol=0.05)
    assert np.bincount(zipf(4, 0.0, 40_000, rng())).min() > 9_500  # exponent 0: all alike
    assert set(zipf(1, 1.0, 10, rng())) == {0}


def test_numbers_of_candidates():
    assert set(Candidates.parse("7").draw(50, rng())) == {7}
    drawn = Candidates.parse("20-22").draw(500, rng())
    assert set(drawn) == {20, 21, 22}
    drawn = Candidates.parse("lognormal:100").draw(20_000, rng())
    assert np.median(drawn) == pytest.approx(100, rel=0.03)
    assert drawn.mean() == pytest.approx(100 * np.exp(0.7**2 / 2), rel=0.05)
    assert drawn.max() <= 1000
    assert Candidates.parse("lognormal:1").draw(1000, rng()).min() == 1


@pytest.mark.parametrize("text", ["", "0", "x", "5-", "9-3", "lognormal:3-9", "normal:3", "-4", "1e3"])
def test_other_words_for_candidates_are_refused(text):
    with pytest.raises(UserError, match="--candidates"):
        Candidates.parse(text)
