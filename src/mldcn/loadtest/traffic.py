"""Ranking requests made of a server's own sample, or of the rows of a log."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mldcn.errors import UserError
from mldcn.loadtest.draws import Candidates, zipf

Columns = dict[str, list[Any]]
_LOG_ROWS = 100_000
_MISSING = 0.03  # share of made-up values that are not known
_KNOWN = 0.5  # share of made-up ids that the model knows
_LONGEST = 6  # times as long as in the sample


@dataclass(frozen=True)
class Ask:
    """A request: one value a column for the user and the context, a list for the candidates."""

    user: dict[str, Any]
    context: dict[str, Any]
    candidates: Columns

    @property
    def rows(self) -> int:
        """Candidates."""
        return len(next(iter(self.candidates.values())))

    def columns(self) -> Columns:
        """All columns by row, as the Open Inference Protocol wants them."""
        constant = {name: [value] * self.rows for name, value in (self.user | self.context).items()}
        return constant | self.candidates


class Traffic:
    """Draws requests.

    Args:
        sample: what ``/v1/sample`` answers.
        candidates: how many a request has.
        users: from whom requests come.
        exponent: of Zipf's law, by which they come.
        seed: of everything that is drawn.
        log: a table of real rows to take values from; without it they are varied from the sample's.
    """

    def __init__(
        self,
        sample: Mapping[str, Any],
        candidates: Candidates,
        users: int,
        exponent: float,
        seed: int,
        log: Columns | None = None,
    ) -> None:
        self._sample = sample
        self._candidates = candidates
        self._users = users
        self._exponent = exponent
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._log = log

    def draw(self, count: int) -> Iterator[Ask]:
        """So many requests."""
        users = zipf(self._users, self._exponent, count, self._rng)
        sizes = self._candidates.draw(count, self._rng)
        make = self._of_sample if self._log is None else self._of_log
        for user, size in zip(users.tolist(), sizes.tolist(), strict=True):
            yield make(user, size)

    def _of_sample(self, user: int, size: int) -> Ask:
        # The same user has the same features each time; the context and the candidates change.
        own = np.random.default_rng((self._seed, user))
        given = {name: [value] for name, value in self._sample["user"].items()}
        around = {name: [value] for name, value in self._sample["context"].items()}
        drawn = varied(given, 1, own, str(user))
        return Ask(
            {name: values[0] for name, values in drawn.items()},
            {name: values[0] for name, values in varied(around, 1, self._rng).items()},
            varied(self._sample["candidates"], size, self._rng),
        )

    def _of_log(self, user: int, size: int) -> Ask:
        assert self._log is not None
        rows = len(next(iter(self._log.values())))
        # One row of the log stands for a user.
        place = int(np.random.default_rng((self._seed, user)).integers(rows))
        other = int(self._rng.integers(rows))
        places = self._rng.integers(0, rows, size).tolist()
        return Ask(
            {name: self._log[name][place] for name in self._sample["user"]},
            {name: self._log[name][other] for name in self._sample["context"]},
            {name: [self._log[name][i] for i in places] for name in self._sample["candidates"]},
        )


def varied(columns: Mapping[str, list[Any]], rows: int, rng: np.random.Generator, name: str = "") -> Columns:
    """Rows like those of the sample.

    Ids are the sample's or made up, numbers lie between 0 and twice the sample's largest, vectors are moved, lists
    get longer. Columns of lists stay as long as each other, as a sequence's items, times and actions must.

    Args:
        columns: the sample's values.
        rows: how many to make.
        rng: draws.
        name: of the one whom a made-up id stands for; many are drawn from without it.
    """
    count = len(next(iter(columns.values()), []))
    if not count:
        return {}
    places = rng.integers(0, count, rows).tolist()
    times = rng.integers(1, _LONGEST + 1, rows).tolist()
    return {
        column: [
            _varied(column, values, place, time, rng, name) for place, time in zip(places, times, strict=True)
        ]
        for column, values in columns.items()
    }


def _varied(
    column: str, values: list[Any], place: int, times: int, rng: np.random.Generator, name: str
) -> Any:
    value = values[place]
    if isinstance(value, list):
        if value and all(isinstance(each, float) for each in value):
            return [each + float(rng.normal(scale=0.1)) for each in value]  # a vector, whose length is fixed
        return value * times
    known = [each for each in values if each is not None]
    if not known or rng.random() < _MISSING:
        return None
    if isinstance(known[0], float):
        return round(float(rng.uniform(0.0, 2.0 * max(known) + 1.0)), 3)
    if isinstance(known[0], str) and rng.random() >= _KNOWN:
        return f"{column}-{name or rng.integers(1_000_000)}"
    return copy.copy(known[int(rng.integers(len(known)))])


def read_log(path: Path, sample: Mapping[str, Any]) -> Columns:
    """The first rows of a log in Parquet or CSV, of the columns that the model takes.

    Raises:
        UserError: it cannot be read, is empty, or lacks a column.
    """
    import polars as pl

    wanted = [name for part in ("user", "context", "candidates") for name in sample[part]]
    try:
        if path.suffix == ".parquet":
            table = pl.scan_parquet(path).head(_LOG_ROWS).collect()
        else:
            table = pl.read_csv(path, n_rows=_LOG_ROWS, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: cannot be read as Parquet or CSV ({str(error).splitlines()[0]})") from None
    lacking = [name for name in wanted if name not in table.columns]
    if lacking or not table.height:
        raise UserError(f"{path}: has no {', '.join(map(repr, lacking)) or 'rows'}, which the model takes")
    return {name: table[name].to_list() for name in wanted}
