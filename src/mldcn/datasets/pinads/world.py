"""The world behind the ``pinads`` log: who the users are, what the ads are, when and where they meet.

Everything here is drawn once from the seed, before the first impression, and depends on the parameters only
(not on the size of a log), so that logs of different sizes and a closed-loop simulation share one world.

Each user and each pin has a hidden *taste* vector. What a model sees of it is a noisy linear image (the user
embedding, the content embedding), topics picked by it, and the behaviour that follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from mldcn.schema import Strict

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TASKS = ("click", "good_click", "outbound_click", "save")
START = 1_704_067_200  # Monday 2024-01-01 00:00 UTC, the first second of every log
DAY = 86_400

AGE_GROUPS = (None, "18-24", "25-34", "35-44", "45-54", "55-64", "65+")
GENDERS = ("female", "male", "unspecified")
COUNTRIES = ("US", "DE", "GB", "FR", "BR", "CA", "MX", "IT", "ES", "AU", "NL", "JP")
SURFACES = ("home", "search", "related")
DEVICES = ("ios", "android", "web")
FORMATS = ("image", "video", "carousel", "collection")
CATEGORIES = (
    "animals", "architecture", "art", "beauty", "books", "cars", "design", "diy", "education", "electronics",
    "entertainment", "food", "gardening", "health", "home", "parenting", "sports", "travel", "weddings",
    "womens_fashion",
)  # fmt: skip
TOPICS = tuple(f"topic_{number:02d}" for number in range(40))

AGE_SHARES = (0.08, 0.17, 0.27, 0.20, 0.13, 0.09, 0.06)
GENDER_SHARES = (0.62, 0.27, 0.11)
SURFACE_SHARES = (0.55, 0.20, 0.25)
DEVICE_SHARES = (0.45, 0.37, 0.18)
FORMAT_SHARES = (0.55, 0.25, 0.14, 0.06)

TASTE = 8  # width of the hidden taste vectors
EMBEDDING = 16  # width of their noisy images in the log
EMBEDDING_NOISE = 0.25


class PinadsConfig(Strict):
    """Everything that shapes a ``pinads`` log; with a size it fixes the log to the last bit.

    ``truth`` picks what the true probabilities are made of (``truth.py`` documents each term):
    ``mixed`` has low-order terms, crosses of orders 3 to 6 and crosses that an instance's gate turns on;
    ``low_order`` has main effects and second-order matches only; ``dense`` is a random smooth MLP of the
    inputs.
    """

    seed: int = Field(0, ge=0)
    num_users: int = Field(10_000, ge=10)
    num_items: int = Field(1_500, ge=20)
    num_advertisers: int = Field(80, ge=2)
    user_zipf: float = Field(0.7, ge=0, description="exponent of the users' activity by rank")
    item_zipf: float = Field(0.9, ge=0, description="exponent of the pins' popularity by rank")
    new_items: float = Field(0.4, ge=0, lt=1, description="share of the pins that arrive while the log runs")
    days: float = Field(14.0, gt=0, description="time from the first impression to the last")
    warm_up: float = Field(0.25, ge=0, description="impressions simulated, not logged, before; share of size")
    min_candidates: int = Field(3, ge=1, description="fewest ads in a request")
    max_candidates: int = Field(8, ge=1, description="most ads in a request")
    new_users: float = Field(0.0, ge=0, lt=1, description="share of the users that arrive while the log runs")
    drift: float = Field(
        0.0, ge=0, le=1, description="share of pins' quality and of the interactions that is new each day"
    )
    history_length: int = Field(16, ge=1, description="length of the recent-engagement sequence")
    chunk_requests: int = Field(512, ge=1, description="requests between two updates of the counters")
    truth: Literal["mixed", "low_order", "dense"] = "mixed"
    weights: dict[str, float] = Field({}, description="logit deviation of single terms, over truth's own")
    position_effect: float = Field(0.15, ge=0, description="logit lost for each unit of log(position)")
    rates: tuple[float, float, float, float] = Field(
        (0.15, 0.55, 0.35, 0.06), description="mean of click, good and outbound click (of clicks), save"
    )

    @model_validator(mode="after")
    def _ranges_hold(self) -> PinadsConfig:
        if self.min_candidates > self.max_candidates:
            raise ValueError("min_candidates is above max_candidates")
        if not all(0 < rate < 1 for rate in self.rates):
            raise ValueError("rates must lie between 0 and 1")
        return self

    def told(self) -> dict[str, Any]:
        """As plain data; what drifts is named only where something does."""
        still = {name for name in ("new_users", "drift") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=still)


@dataclass(frozen=True)
class Contexts:
    """Where and when an ad is shown; four arrays of one length ``(n,)``.

    ``time`` is in seconds since 1970 (UTC), ``surface`` and ``device`` number SURFACES and DEVICES, and
    ``position`` is 1 at the top.
    """

    time: Ints
    surface: Ints
    device: Ints
    position: Ints

    @property
    def day(self) -> Ints:
        """Days since START; 0 also for what was before."""
        return np.asarray(np.maximum((self.time - START) // DAY, 0), dtype=np.int64)

    @property
    def hour(self) -> Ints:
        """Hour of the day, 0 to 23, UTC."""
        return np.asarray(self.time // 3600 % 24, dtype=np.int64)

    @property
    def weekday(self) -> Ints:
        """Day of the week, 0 is Monday."""
        return np.asarray((self.time - START) // DAY % 7, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True)
class Users:
    """One row a user. Codes number the module's constants."""

    age: Ints
    gender: Ints
    country: Ints
    tenure_days: Ints  # on the log's first day
    sessions_28d: Ints
    device: Ints  # the one used most
    activity: Floats  # probability that a request is this user's
    birth: Floats  # seconds after START from which there are requests
    taste: Floats  # (users, TASTE), hidden
    embedding: Singles  # (users, EMBEDDING)
    topics: npt.NDArray[np.bool_]  # (users, TOPICS), declared interests
    category_shares: Floats  # (users, CATEGORIES), what retrieval offers; rows sum to 1

    def __len__(self) -> int:
        return len(self.age)


@dataclass(frozen=True)
class Items:
    """One row a pin, ordered by category (so that a category is a slice)."""

    pin_id: Ints
    advertiser: Ints
    category: Ints
    format: Ints
    price: Floats  # the advertiser's price for a click
    birth: Floats  # seconds after START at which the pin can first be shown
    popularity: Floats  # weight in retrieval
    taste: Floats  # (items, TASTE), hidden
    quality: Floats  # (items,), hidden and seen by nobody but through past clicks
    embedding: Singles  # (items, EMBEDDING)
    topics: npt.NDArray[np.bool_]  # (items, TOPICS)

    def __len__(self) -> int:
        return len(self.pin_id)


def stream(seed: int, *key: int) -> np.random.Generator:
    """An own random stream for each part of the world, so that turning one part leaves the rest alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def pick(rng: np.random.Generator, shares: npt.ArrayLike, size: int) -> Ints:
    """Draws ``size`` codes with these probabilities (inverse of the distribution function)."""
    upper = np.cumsum(np.asarray(shares, dtype=np.float64))
    found = np.searchsorted(upper, rng.random(size) * upper[-1], side="right")
    return np.asarray(np.minimum(found, len(upper) - 1), dtype=np.int64)


def dot(left: Floats, right: Floats) -> Floats:
    """The matrix product, summed in an order of its own: BLAS's depends on threads and on the number of rows."""
    return np.asarray(np.einsum("nj,jt->nt", left, right), dtype=np.float64)


def zipf(size: int, exponent: float) -> Floats:
    """Probabilities proportional to ``rank ** -exponent``."""
    weight = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    return np.asarray(weight / weight.sum(), dtype=np.float64)


def draw_tastes(seed: int) -> tuple[Floats, Floats]:
    """Taste vectors of the categories and of the topics, which users and pins share."""
    rng = stream(seed, 0)
    return rng.standard_normal((len(CATEGORIES), TASTE)), rng.standard_normal((len(TOPICS), TASTE))


def draw_users(config: PinadsConfig) -> Users:
    """Users with demographics, a taste that depends on them in part, and its images."""
    rng = stream(config.seed, 1)
    n = config.num_users
    categories, topics = draw_tastes(config.seed)
    age = pick(rng, AGE_SHARES, n)
    gender = pick(rng, GENDER_SHARES, n)
    country = pick(rng, zipf(len(COUNTRIES), 1.0), n)
    group = rng.standard_normal((len(AGE_GROUPS), TASTE)) + rng.standard_normal((len(GENDERS), 1, TASTE))
    # Each coordinate has variance 1: 0.36 from age and gender, the rest the user's own.
    taste = 0.6 / np.sqrt(2) * group[gender, age] + 0.8 * rng.standard_normal((n, TASTE))
    # Activity is Zipf by rank, and ranks are dealt at random: a low id says nothing.
    activity = zipf(n, config.user_zipf)[rng.permutation(n)]
    sessions = np.minimum(200, 1 + (activity * n * 8 * np.exp(0.3 * rng.standard_normal(n)))).astype(np.int64)
    offered = np.exp(0.6 * dot(taste, categories.T))
    return Users(
        age=age,
        gender=gender,
        country=country,
        tenure_days=np.exp(5.5 + 1.2 * rng.standard_normal(n)).astype(np.int64),
        sessions_28d=sessions,
        device=pick(rng, DEVICE_SHARES, n),
        activity=activity,
        birth=_births(stream(config.seed, 12), n, config.new_users, config.days),
        taste=taste,
        embedding=_image(rng, taste),
        topics=_choose_topics(rng, taste, topics, most=5),
        category_shares=offered / offered.sum(axis=1, keepdims=True),
    )


def draw_items(config: PinadsConfig) -> Items:
    """Pins whose taste is their category's, their advertiser's and their own; some arrive later."""
    rng = stream(config.seed, 2)
    n, advertisers = config.num_items, config.num_advertisers
    categories, topics = draw_tastes(config.seed)
    # An advertiser is at home in one category and has Zipf-distributed numbers of pins.
    home = pick(rng, np.ones(len(CATEGORIES)), advertisers)
    advertiser = pick(rng, zipf(advertisers, 0.8), n)
    strays = rng.random(n) < 0.2
    category = np.where(strays, pick(rng, np.ones(len(CATEGORIES)), n), home[advertiser])
    own = rng.standard_normal((advertisers, TASTE))
    taste = np.sqrt([[0.4], [0.25], [0.35]])
    mixed = taste[0] * categories[category] + taste[1] * own[advertiser]
    mixed = mixed + taste[2] * rng.standard_normal((n, TASTE))
    birth = _births(rng, n, config.new_items, config.days)
    price = np.exp(-0.5 + 0.5 * rng.standard_normal(advertisers)[advertiser] + 0.3 * rng.standard_normal(n))
    items = Items(
        pin_id=np.arange(n) + 1,
        advertiser=advertiser,
        category=category,
        format=pick(rng, FORMAT_SHARES, n),
        price=np.round(np.clip(price, 0.05, 20.0), 2),
        birth=birth,
        popularity=zipf(n, config.item_zipf)[rng.permutation(n)],
        taste=mixed,
        quality=rng.standard_normal(n),
        embedding=_image(rng, mixed),
        topics=_choose_topics(rng, mixed, topics, most=4),
    )
    order = np.argsort(category, kind="stable")
    return Items(**{name: column[order] for name, column in vars(items).items()})


def _births(rng: np.random.Generator, size: int, late: float, days: float) -> Floats:
    """Seconds after START; minus infinity for those that were there before."""
    arrives = rng.random(size) < late
    return np.where(arrives, rng.random(size) * days * DAY, -np.inf)


def _image(rng: np.random.Generator, taste: Floats) -> Singles:
    """What an upstream encoder would say of a taste: a random linear map of it, with noise."""
    mixing = rng.standard_normal((TASTE, EMBEDDING)) / np.sqrt(TASTE)
    noise = EMBEDDING_NOISE * rng.standard_normal((len(taste), EMBEDDING))
    return np.asarray(dot(taste, mixing) + noise, dtype=np.float32)


def _choose_topics(
    rng: np.random.Generator, taste: Floats, topics: Floats, most: int
) -> npt.NDArray[np.bool_]:
    """One to ``most`` topics each, the best matches under Gumbel noise (a sample without replacement)."""
    match = dot(taste, topics.T) / np.sqrt(TASTE) * 1.5
    noisy = match - np.log(-np.log(rng.random(match.shape)))
    ranks = np.argsort(np.argsort(-noisy, axis=1, kind="stable"), axis=1, kind="stable")
    count = 1 + np.floor(rng.random(len(taste)) * most).astype(np.int64)
    return np.asarray(ranks < count[:, None], dtype=np.bool_)
