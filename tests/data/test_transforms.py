import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mldcn.data import transforms
from mldcn.data.transforms import (
    FittedNumeric,
    Moments,
    NumericFitter,
    RowSample,
    bucket_numbers,
    quantile_boundaries,
    row_priorities,
)
from mldcn.errors import UserError
from mldcn.schema import Bucketised, Numeric

NAN = math.nan


def fitted(values, blocks=1, **options):
    fitter = NumericFitter(Numeric(kind="numeric", name="x", **options))
    first = 0
    for part in np.array_split(np.array(values, float), blocks):
        fitter.update(part, row_priorities(first, len(part)))
        first += len(part)
    return fitter.finish()


def applied(numeric, *values):
    return numeric.apply(np.array(values, float)).tolist()


def test_standardised_and_missing_is_the_mean():
    numeric = fitted([1, 3, NAN])
    assert applied(numeric, 1, 3, 2, NAN) == [[-1], [1], [0], [0]]


def test_plain_and_missing_is_the_mean():
    numeric = fitted([1, 3, NAN], standardise=False)
    assert applied(numeric, 7, NAN) == [[7], [2]]


def test_missing_indicator():
    assert applied(fitted([1, 3], missing_indicator=True), 3, NAN) == [[1, 0], [0, 1]]


def test_log_with_offset_as_criteos_second_number():
    numeric = fitted([-3, 0, math.e - 4], transform="log", offset=4, standardise=False)
    expected = [[0], [math.log(4)], [math.log(104)]]
    np.testing.assert_allclose(applied(numeric, -3, 0, 100), expected, rtol=1e-6)


def test_log_raises_small_values_to_the_smallest_that_has_one():
    numeric = fitted([-5, 1, 3], transform="log", offset=1, standardise=False)
    # -5 has no logarithm; the smallest training value that has one is 1.
    np.testing.assert_allclose(
        applied(numeric, -5, -1, 0.5, 1, 3), [[math.log(2)]] * 4 + [[math.log(4)]], rtol=1e-6
    )
    assert numeric.fill == pytest.approx((2 * math.log(2) + math.log(4)) / 3)


def test_log_of_nothing_says_so():
    with pytest.raises(UserError, match=r"column 'x': no training value is above -1.*raise its offset"):
        fitted([-1, -2], transform="log")


def test_signed_log():
    numeric = fitted([0, 1], transform="signed_log", standardise=False)
    np.testing.assert_allclose(applied(numeric, -3, 0, 3), [[-math.log(4)], [0], [math.log(4)]], rtol=1e-6)


def test_quantile_is_the_distribution_function_with_ties_in_the_middle():
    numeric = fitted([1, 2, 2, 3], transform="quantile", standardise=False)
    assert applied(numeric, 0, 1, 2, 3, 9) == [[0], [0.125], [0.5], [0.875], [1]]
    assert applied(numeric, NAN) == [[0.5]]


def test_quantile_of_a_large_column_is_near_uniform(monkeypatch):
    monkeypatch.setattr(transforms, "SAMPLE_ROWS", 100_000)
    values = np.random.default_rng(0).lognormal(size=150_000)
    ranks = fitted(values, blocks=7, transform="quantile", standardise=False).apply(values)[:, 0]
    truth = np.argsort(np.argsort(values)) / len(values)
    assert np.abs(ranks - truth).max() < 0.01


@pytest.mark.parametrize("transform", ["identity", "log", "signed_log", "quantile"])
def test_an_empty_and_a_constant_column_give_zeros(transform):
    assert applied(fitted([NAN, NAN], transform=transform), NAN, 5)[0] == [0]
    assert applied(fitted([2, 2], transform=transform), 2, NAN) == [[0], [0]]


def test_finite_numbers_stay_finite():
    numeric = fitted([0, 1], standardise=False)
    assert np.isfinite(numeric.apply(np.array([1e300, -1e300]))).all()
    with pytest.raises(UserError, match="too large to average"):
        fitted([1e300, -1e300])


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.integers(1, 7))
def test_moments_by_parts_are_those_of_the_whole(values, parts):
    moments = Moments()
    for part in np.array_split(np.array(values), parts):
        moments.update(part)
    assert moments.count == len(values)
    if values:
        assert moments.mean == pytest.approx(np.mean(values), abs=1e-6)
        assert moments.deviation == pytest.approx(np.std(values), abs=1e-5)


@given(st.integers(1, 9), st.integers(1, 9))
def test_the_sample_does_not_depend_on_the_blocks(one, other):
    values = np.arange(500.0)

    def sample(parts):
        result, first = RowSample(size=20), 0
        for part in np.array_split(values, parts):
            result.update(part, row_priorities(first, len(part)))
            first += len(part)
        return result.values().tolist()

    assert sample(one) == sample(other)
    assert len(sample(one)) == 20


def test_saved_and_loaded():
    numeric = fitted([1, 5, 9, NAN], transform="quantile", missing_indicator=True)
    assert FittedNumeric.from_json(numeric.to_json()) == numeric


def buckets(method, values, fitted_boundaries=(), **options):
    feature = Bucketised(kind="bucketised", name="x", method=method, **options)
    return bucket_numbers(feature, np.array(values, float), fitted_boundaries or feature.boundaries).tolist()


def test_criteos_log2_buckets():
    # floor(ln(x)^2) above 2, x itself below.
    assert buckets("log2", [-2, 0, 1, 2, 3, 10, 100]) == [-2, 0, 1, 2, 1, 5, 21]


def test_given_boundaries():
    assert buckets("boundaries", [-1, 0, 0.5, 1, 7], boundaries=(0.0, 1.0)) == [0, 1, 1, 2, 2]


def test_quantile_boundaries_cut_evenly():
    assert quantile_boundaries(np.arange(100.0), 4) == (25, 50, 75)
    # Half the values are 0: the cuts that fall on them are left out.
    assert quantile_boundaries(np.array([0.0] * 50 + list(range(1, 51))), 4) == (1, 26)
    assert quantile_boundaries(np.zeros(0), 4) == ()
