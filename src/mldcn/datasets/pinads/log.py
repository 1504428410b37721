"""The ``pinads`` log: requests, impressions, and the features that a serving system would have had then.

The log is made chunk by chunk (``chunk_requests`` requests, in time order), so memory is bounded by the world
and one chunk. Running features (prior CTR, counters, the recent-engagement sequence) are updated between
chunks: an impression's features know everything up to the end of the chunk before and nothing later, the lag
of a feature store that is refreshed every so often. A pin can be shown from the first chunk after its birth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mldcn.datasets.pinads.truth import World
from mldcn.datasets.pinads.world import (
    AGE_GROUPS,
    CATEGORIES,
    COUNTRIES,
    DAY,
    DEVICE_SHARES,
    DEVICES,
    FORMATS,
    GENDERS,
    START,
    SURFACE_SHARES,
    SURFACES,
    TASKS,
    TOPICS,
    Contexts,
    Floats,
    Ints,
    PinadsConfig,
    pick,
    stream,
)
from mldcn.errors import UserError

PRIOR_STRENGTH = 20.0  # impressions that the mean rate counts for in prior_ctr
DWELL_SCALE = 0.9  # of log dwell seconds given a click
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Impressions:
    """A chunk of the log: who saw what and when, what was true, and what came of it."""

    request: Ints
    users: Ints  # rows of World.users
    items: Ints  # rows of World.items
    contexts: Contexts
    probability: Floats  # (n, 4)
    click: Flags
    save: Flags
    outbound: Flags  # meaningless without a click
    dwell: Floats  # seconds; meaningless without a click

    def __len__(self) -> int:
        return len(self.users)


class History:
    """What has happened so far, as a feature store knows it: counters and recent engagements.

    ``columns`` reads it for any impressions, ``update`` adds impressions that are over; a closed-loop
    simulation calls the two in turn, as the log's generator does.
    """

    def __init__(self, world: World) -> None:
        users, items, length = len(world.users), len(world.items), world.config.history_length
        self._world = world
        self._item = np.zeros((items, 2), dtype=np.int64)  # impressions, clicks
        self._user = np.zeros((users, 2), dtype=np.int64)
        self._pair = PairCounts(2)
        self._events = np.zeros(users, dtype=np.int64)
        self._pins = np.zeros((users, length), dtype=np.int64)
        self._times = np.zeros((users, length), dtype=np.int64)
        self._saved = np.zeros((users, length), dtype=np.bool_)

    def columns(self, users: Ints, items: Ints) -> dict[str, pa.Array]:
        """The running features of n (user, item) pairs, as the log names them."""
        world = self._world
        shown, clicked = self._item[items].T
        rate = (clicked + PRIOR_STRENGTH * world.config.rates[0]) / (shown + PRIOR_STRENGTH)
        pair = self._pair.get(self._pair_keys(users, items))
        length = world.config.history_length
        count = np.minimum(self._events[users], length)
        slot = (self._events[users] - count)[:, None] + np.arange(length)
        taken = np.arange(length) < count[:, None]
        offsets = pa.array(np.concatenate([[0], np.cumsum(count)]), pa.int32())
        rows = np.broadcast_to(users[:, None], slot.shape)[taken]
        slots = (slot % length)[taken]

        def listed(values: pa.Array) -> pa.Array:
            return pa.ListArray.from_arrays(offsets, values)

        return {
            "user_impressions": pa.array(self._user[users, 0]),
            "user_clicks": pa.array(self._user[users, 1]),
            "recent_pins": listed(pa.array(self._pins[rows, slots])),
            "recent_times": listed(pa.array(self._times[rows, slots])),
            "recent_actions": listed(_named(("click", "save"), self._saved[rows, slots].astype(np.int64))),
            "prior_impressions": pa.array(shown),
            "prior_ctr": pa.array(rate),
            "user_advertiser_impressions": pa.array(pair[:, 0]),
            "user_advertiser_clicks": pa.array(pair[:, 1]),
        }

    def update(self, done: Impressions) -> None:
        """Counts impressions, clicks and engagements (a click or a save; a save is the one shown)."""
        ones = np.stack([np.ones(len(done), dtype=np.int64), done.click.astype(np.int64)], axis=1)
        np.add.at(self._item, done.items, ones)
        np.add.at(self._user, done.users, ones)
        self._pair.add(self._pair_keys(done.users, done.items), ones)
        engaged = np.flatnonzero(done.click | done.save)
        engaged = engaged[np.lexsort((done.contexts.time[engaged], done.users[engaged]))]
        users = done.users[engaged]
        first = np.searchsorted(users, users, side="left")
        place = self._events[users] + np.arange(len(users)) - first
        # In order of time, so that where a chunk holds more events than slots the newest stay.
        slot = place % self._pins.shape[1]
        self._pins[users, slot] = self._world.items.pin_id[done.items[engaged]]
        self._times[users, slot] = done.contexts.time[engaged]
        self._saved[users, slot] = done.save[engaged]
        np.add.at(self._events, users, 1)

    def _pair_keys(self, users: Ints, items: Ints) -> Ints:
        return users * self._world.config.num_advertisers + self._world.items.advertiser[items]


class PairCounts:
    """Sums by a sparse integer key: sorted runs of falling length, merged as a log-structured tree is.

    Adding n keys in all costs O(n log n) and memory holds each distinct key once or twice.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._runs: list[tuple[Ints, Ints]] = []

    def add(self, keys: Ints, values: Ints) -> None:
        """Adds ``values (n, width)`` to the sums of ``keys (n,)``."""
        run = _sum_by_key(keys, values)
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            other = self._runs.pop()
            run = _sum_by_key(np.concatenate([other[0], run[0]]), np.concatenate([other[1], run[1]]))
        self._runs.append(run)

    def get(self, keys: Ints) -> Ints:
        """The sums ``(n, width)``, 0 for a key never added."""
        total = np.zeros((len(keys), self._width), dtype=np.int64)
        for known, sums in self._runs:
            at = np.minimum(np.searchsorted(known, keys), max(len(known) - 1, 0))
            if len(known):
                total += np.where((known[at] == keys)[:, None], sums[at], 0)
        return total


def _sum_by_key(keys: Ints, values: Ints) -> tuple[Ints, Ints]:
    distinct, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(distinct), values.shape[1]), dtype=np.int64)
    np.add.at(sums, inverse, values)
    return distinct, sums


def simulate(world: World, size: int) -> Iterator[tuple[Impressions, History]]:
    """Chunks of the log in time order, each with the history as it was when the chunk began.

    The history is updated when the next chunk is asked for; read its columns before.

    Args:
        world: users, items and truth.
        size: impressions in the log, not counting the warm-up.
    """
    if size < 1:
        raise UserError(f"pinads: size is the number of impressions, at least 1 (found {size})")
    config = world.config
    history = History(world)
    done, request, chunk = -int(size * config.warm_up), 0, 0
    while done < size:
        impressions = _chunk(world, chunk, done, size)
        # The log's first request is whole: a chunk that would run from the warm-up into the log is cut there.
        room = size - done if done >= 0 else -done
        if len(impressions) > room:
            impressions = _take(impressions, np.arange(room), 0)
        if done >= 0:
            logged = _take(impressions, np.arange(len(impressions)), request + 1)
            request = int(logged.request[-1])
            yield logged, history
        history.update(impressions)
        done += len(impressions)
        chunk += 1


def _chunk(world: World, number: int, done: int, size: int) -> Impressions:
    config = world.config
    rng = stream(config.seed, 20, number)
    asked = config.chunk_requests
    now = _seconds(config, np.array([done / size]))[0]
    users = pick(rng, np.where(world.users.birth <= now, world.users.activity, 0.0), asked)
    surface = pick(rng, SURFACE_SHARES, asked)
    usual = rng.random(asked) < 0.8
    device = np.where(usual, world.users.device[users], pick(rng, DEVICE_SHARES, asked))
    width = config.max_candidates
    least = config.min_candidates
    wanted = least + np.floor(rng.random(asked) * (width - least + 1)).astype(np.int64)
    weight = np.where(world.items.birth <= now, world.items.popularity, 0.0)
    items = world.retrieve(rng, np.repeat(users, width), weight).reshape(asked, width)
    shown = np.arange(width) < wanted[:, None]
    for place in range(1, width):  # an ad is shown once in a request
        shown[:, place] &= ~(items[:, :place] == items[:, place : place + 1]).any(axis=1)
    position = np.cumsum(shown, axis=1, dtype=np.int64)[shown]
    count = shown.sum(axis=1)
    row = np.repeat(np.arange(asked), count)
    share = (done + np.cumsum(count) - count) / size
    time = START + np.floor(_seconds(config, share)).astype(np.int64)
    contexts = Contexts(time=time[row], surface=surface[row], device=device[row], position=position)
    probability = world.probability(users[row], items[shown], contexts)
    click, outbound, save = (rng.random((len(row), 3)) < probability[:, [0, 2, 3]]).T
    # Dwell given a click is log-logistic, which makes P(dwell > 30 s) the good click's probability exactly.
    good = probability[:, 1]
    noise = np.clip(rng.random(len(row)), 1e-12, 1 - 1e-12)
    dwell = 30.0 * np.exp(DWELL_SCALE * (np.log(good / (1 - good)) + np.log(noise / (1 - noise))))
    return Impressions(
        request=row,
        users=users[row],
        items=items[shown],
        contexts=contexts,
        probability=probability,
        click=click,
        save=save,
        outbound=outbound,
        dwell=dwell,
    )


def _seconds(config: PinadsConfig, share: Floats) -> Floats:
    """When this share of the log has passed: traffic swings through the day, least at night (UTC).

    The share of traffic before second s of a day of D is s/D - 0.1 sin(2 pi s/D), inverted on a grid. Warm-up
    shares are negative and lie before START.
    """
    days = share * config.days
    grid = np.linspace(0.0, 1.0, 1441)
    passed = grid - 0.1 * np.sin(2.0 * np.pi * grid)
    whole = np.floor(days)
    return np.asarray((whole + np.interp(days - whole, passed, grid)) * DAY, dtype=np.float64)


def _take(impressions: Impressions, rows: Ints, shift: int) -> Impressions:
    columns = vars(impressions)
    contexts = Contexts(**{name: column[rows] for name, column in vars(impressions.contexts).items()})
    taken = {name: column[rows] for name, column in columns.items() if name != "contexts"}
    taken["request"] = taken["request"] + shift
    return Impressions(contexts=contexts, **taken)


class Columns:
    """Turns impressions into the log's columns. Built once a world; static features are gathered."""

    def __init__(self, world: World) -> None:
        self._world = world
        users, items = world.users, world.items
        self._users = pa.table(
            {
                "user_id": pa.array(np.arange(len(users)) + 1),
                "age_group": _named(AGE_GROUPS, users.age),
                "gender": _named(GENDERS, users.gender),
                "country": _named(COUNTRIES, users.country),
                "sessions_28d": pa.array(users.sessions_28d),
                "user_embedding": _vectors(users.embedding),
                "user_topics": _topics(users.topics),
            }
        )
        self._items = pa.table(
            {
                "pin_id": pa.array(items.pin_id),
                "advertiser_id": pa.array(items.advertiser + 1),
                "category": _named(CATEGORIES, items.category),
                "format": _named(FORMATS, items.format),
                "price": pa.array(items.price),
                "content_embedding": _vectors(items.embedding),
                "pin_topics": _topics(items.topics),
            }
        )

    def features(self, users: Ints, items: Ints, contexts: Contexts, history: History) -> dict[str, pa.Array]:
        """Every feature column for n impressions, logged or only thought of."""
        elapsed = (contexts.time - START) // DAY
        columns: dict[str, pa.Array] = {}
        for table, rows in ((self._users, users), (self._items, items)):
            taken = table.take(pa.array(rows))
            columns |= {name: taken.column(name).combine_chunks() for name in table.column_names}
        columns["tenure_days"] = pa.array(np.maximum(self._world.users.tenure_days[users] + elapsed, 0))
        columns |= history.columns(users, items)
        columns["surface"] = _named(SURFACES, contexts.surface)
        columns["device"] = _named(DEVICES, contexts.device)
        columns["hour"] = pa.array(contexts.hour)
        columns["weekday"] = pa.array(contexts.weekday)
        return columns

    def batch(self, impressions: Impressions, history: History) -> pa.RecordBatch:
        """The log's rows for impressions: keys, features, labels and the leak ``dwell_seconds``."""
        contexts = impressions.contexts
        no_click = ~impressions.click
        columns: dict[str, pa.Array] = {
            "request_id": pa.array(impressions.request),
            "timestamp": pa.array(contexts.time),
            "position": pa.array(contexts.position),
        }
        columns |= self.features(impressions.users, impressions.items, contexts, history)
        columns["click"] = pa.array(impressions.click.astype(np.int8))
        columns["good_click"] = pa.array((impressions.dwell > 30.0).astype(np.int8), mask=no_click)
        columns["outbound_click"] = pa.array(impressions.outbound.astype(np.int8), mask=no_click)
        columns["save"] = pa.array(impressions.save.astype(np.int8))
        columns["dwell_seconds"] = pa.array(impressions.dwell, mask=no_click)
        return pa.RecordBatch.from_pydict(columns)


def _named(names: tuple[str | None, ...], codes: Ints) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes))


def _vectors(values: np.ndarray[Any, np.dtype[np.float32]]) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _topics(chosen: Flags) -> pa.Array:
    rows, topics = np.nonzero(chosen)
    offsets = np.searchsorted(rows, np.arange(len(chosen) + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _named(TOPICS, topics))


def batches(world: World, size: int) -> Iterator[tuple[pa.RecordBatch, Floats]]:
    """The log as record batches in time order, each with its true probabilities ``(n, 4)``."""
    columns = Columns(world)
    for impressions, history in simulate(world, size):
        yield columns.batch(impressions, history), impressions.probability


def label_matrix(batch: pa.RecordBatch | pa.Table) -> Floats:
    """The labels ``(n, 4)`` of TASKS, NaN where null."""
    columns = [pc.fill_null(pc.cast(batch.column(task), pa.float64()), np.nan) for task in TASKS]
    return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
